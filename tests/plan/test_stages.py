"""Stages by literals."""

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import HookPoint, expand
from nemo_qwen_hidden.plan.stages import (
    Split,
    megatron_layout,
    points_of_stage,
    split_layers,
    stage_of,
    stages_of,
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


SPLITS = [
    (8, 4, 1, {}),
    (8, 2, 2, {}),
    (12, 2, 3, {}),
    (10, 4, 1, {"first_layers": 1, "last_layers": 3}),
    (7, 2, 1, {"first_layers": 3}),
    (16, 3, 2, {"first_layers": 4, "last_layers": 4}),
    (14, 4, 2, {"embedding": True, "loss": True}),
    (7, 4, 1, {"embedding": True}),
    (7, 2, 2, {"loss": True}),
]


@pytest.mark.parametrize(("num_layers", "pp", "vp", "options"), SPLITS)
def test_divisions_are_megatron_s(num_layers: int, pp: int, vp: int, options: dict[str, Any]) -> None:
    """Of ``get_num_layers_to_build`` and ``get_transformer_layer_offset`` for the same options."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_layout=None,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        num_layers_in_first_pipeline_stage=options.get("first_layers"),
        num_layers_in_last_pipeline_stage=options.get("last_layers"),
        account_for_embedding_in_pipeline_split=options.get("embedding", False),
        account_for_loss_in_pipeline_split=options.get("loss", False),
    )
    expected = []
    for chunk in range(vp):
        for rank in range(pp):
            start = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=rank)
            expected.append(range(start, start + get_num_layers_to_build(config, vp_stage=chunk, pp_rank=rank)))
    assert stages_of(num_layers, pp=pp, vp=vp, split=Split(**options)) == tuple(expected)


@pytest.mark.parametrize(
    ("layout", "pp", "vp"),
    [
        ("Et*3|(tt|)*2tL", 4, 1),
        ("E|ttt|t|L", 2, 2),
        ("Ettt|(tt|)*2,t|L", 5, 1),
        ("Ett|tL", 2, 1),
        ("E|(t|tt|)*2L", 3, 2),
    ],
)
def test_layouts_are_read_as_megatron_reads_them(layout: str, pp: int, vp: int) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    theirs = PipelineParallelLayerLayout(layout, pp)
    assert theirs.virtual_pipeline_model_parallel_size == vp
    sizes = [
        [member.name for member in theirs.layout[rank][chunk]].count("decoder")
        for chunk in range(vp)
        for rank in range(pp)
    ]
    stages = stages_of(sum(sizes), pp=pp, vp=vp, split=Split(layout=layout))
    assert [len(layers) for layers in stages] == sizes
    assert [layer for layers in stages for layer in layers] == list(range(sum(sizes)))
    ours = PipelineParallelLayerLayout(megatron_layout(stages), pp)
    assert ours.layout == theirs.layout


@pytest.mark.parametrize(
    ("num_layers", "pp", "vp", "split", "setting"),
    [
        (4, 5, 1, Split(), "parallel.pp"),
        (4, 2, 3, Split(), "parallel.vp"),
        (10, 4, 1, Split(first_layers=1), None),
        (10, 4, 1, Split(first_layers=1, last_layers=2), "parallel.first_stage_layers, parallel.last_stage_layers"),
        (10, 2, 2, Split(first_layers=3), "parallel.first_stage_layers"),
        (10, 4, 1, Split(last_layers=11), "parallel.first_stage_layers, parallel.last_stage_layers"),
        (10, 4, 1, Split(embedding=True), "parallel.account_for_embedding, parallel.account_for_loss"),
        (10, 4, 1, Split(embedding=True, first_layers=2), "parallel.account_for_embedding"),
        (4, 2, 1, Split(layout="Ett|ttL", loss=True), "parallel.pipeline_layout"),
        (4, 2, 1, Split(layout="Ett|tL"), "parallel.pipeline_layout"),
        (4, 2, 1, Split(layout="Ett|t|tL"), "parallel.pipeline_layout"),
        (4, 2, 1, Split(layout="ttE|ttL"), "parallel.pipeline_layout"),
        (4, 2, 1, Split(layout="Ett|tmL"), "parallel.pipeline_layout"),
    ],
)
def test_divisions_that_cannot_be(num_layers: int, pp: int, vp: int, split: Split, setting: str | None) -> None:
    if setting is None:
        assert [len(layers) for layers in stages_of(num_layers, pp=pp, vp=vp, split=split)] == [1, 3, 3, 3]
        return
    with pytest.raises(ConfigError) as refused:
        stages_of(num_layers, pp=pp, vp=vp, split=split)
    assert refused.value.setting == setting
