"""Stages by literals."""

import pytest

from nemo_qwen_hidden.hookpoint import HookPoint, expand
from nemo_qwen_hidden.plan.stages import (
    last_active_stage,
    points_of_stage,
    split_layers,
    stage_of,
)


@pytest.mark.parametrize(
    ("num_layers", "pp", "sizes"),
    [(4, 1, [4]), (4, 2, [2, 2]), (5, 2, [3, 2]), (5, 3, [2, 2, 1]), (24, 5, [5, 5, 5, 5, 4]), (3, 3, [1, 1, 1])],
)
def test_sizes_differ_by_at_most_one(num_layers: int, pp: int, sizes: list[int]) -> None:
    stages = split_layers(num_layers, pp)
    assert [len(layers) for layers in stages] == sizes
    assert [layer for layers in stages for layer in layers] == list(range(num_layers))


def test_each_hook_point_is_on_one_stage() -> None:
    stages = split_layers(5, 2)
    points = expand(["embed", "all", "final_norm"], num_layers=5)
    assert [stage_of(point, stages) for point in points] == [0, 0, 0, 0, 1, 1, 1]
    assert points_of_stage(points, stages, 1) == (
        HookPoint("resid_post", 3),
        HookPoint("resid_post", 4),
        HookPoint("final_norm"),
    )


@pytest.mark.parametrize(("depth", "last"), [(0, 0), (1, 0), (3, 0), (4, 1), (5, 1)])
def test_stages_below_the_deepest_hook_point_run(depth: int, last: int) -> None:
    assert last_active_stage(split_layers(5, 2), depth) == last
