"""Nothing deeper than the deepest hook point runs, on any stage; and capturing leaves the model as it was."""

from pathlib import Path

from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import TINY, Tiny, ragged_batch
from tests.support.ranks import layers_computed

HOOK_POINTS = (["embed"], ["resid_post@0"], ["resid_post@3", "embed"], ["resid_post@-1"], ["final_norm"])


def test_layers_that_run(tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    """5 layers on 2 stages: 1 to 3 (Megatron's numbers) and 4 to 5."""
    arguments = (Topology(pp=2), tiny_folders[TINY[0]], ragged_batch((9, 4)), HOOK_POINTS)
    first, second = start_ranks(2, layers_computed, *arguments)
    assert first == [([], True), ([1], True), ([1, 2, 3], True), ([1, 2, 3], True), ([1, 2, 3], True)]
    assert second == [([], True), ([], True), ([4], True), ([4, 5], True), ([4, 5, "norm"], True)]
