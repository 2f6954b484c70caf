"""What the fork server has imported for the ranks, and how."""

import gc
import sys

from nemo_qwen_hidden.parallel.launch import Rank
from tests.conftest import Start

NEEDED = ("nemo_qwen_hidden.running", "nemo_qwen_hidden.model.hidden_model", "nemo_qwen_hidden.store.write.writer")
MANY = 100_000


def beginning(rank: Rank) -> tuple[set[str], bool, int]:
    loaded = {name for name in NEEDED if name in sys.modules}
    return loaded, gc.isenabled(), gc.get_freeze_count()


def test_a_rank_finds_everything_imported_and_out_of_the_collectors_sight(start_ranks: Start) -> None:
    ((loaded, collects, frozen),) = start_ranks(1, beginning)
    assert loaded == set(NEEDED)
    assert collects and frozen > MANY
