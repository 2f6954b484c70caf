"""The pipeline keeps its stages busy: no stage waits for the microbatch that another is still computing."""

from pathlib import Path

from tests.conftest import Start
from tests.support.models import TINY, Tiny, ragged_batch
from tests.support.ranks import runs_ahead


def test_the_first_stage_runs_ahead_of_the_second(
    tiny_folders: dict[Tiny, Path], start_ranks: Start, tmp_path: Path
) -> None:
    """A flush between microbatches, or a send that waits for the receiver to compute, would hang here."""
    batch = ragged_batch((5, 9, 3, 7, 4, 6))
    first, second = start_ranks(2, runs_ahead, tiny_folders[TINY[0]], batch, tmp_path / "meeting")
    assert first == second == [0, 1, 2, 3, 4, 5]
