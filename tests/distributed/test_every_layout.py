"""Every site in every product of the axes that fits on eight ranks, enumerated: transformers' states, and where no sum
is in another order, one rank's bits. ``-rP`` prints how many hook points have other bits than on one rank."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, LAYERLESS_SITES, SITES, HookPoint
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.hf_sites import transformers_sites
from tests.support.models import TINY, Batch, Tiny, ragged_batch, relative_error
from tests.support.ranks import in_each_layout

BOUND = 5e-6
MOST_RANKS = 8
AT_ONCE = 6  # what gloo keeps of process groups adds up
TINY_MODEL = TINY[0]  # 5 layers, 4 heads, 4 query groups
POINTS = tuple(site if site in LAYERLESS_SITES else f"{site}@:" for site in SITES)
OPTIONS: tuple[dict[str, Any], ...] = ({"hook_points": POINTS}, {"hook_points": POINTS, "packing": False})
States = dict[HookPoint, np.ndarray]
Layout = tuple[Topology, dict[str, Any]]


def layouts(world: int) -> list[Layout]:
    """All that this model allows on ``world`` ranks, and divisions of its layers that are not even."""
    found: list[Layout] = []
    for tp, cp, pp, vp, dp, sp in product((1, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 2), (1, 2, 4), (False, True)):
        fits = tp * cp * pp * dp == world and pp * vp <= TINY_MODEL.layers
        if fits and not (sp and tp == 1) and not (vp > 1 and pp == 1):
            found.append((Topology(tp=tp, cp=cp, pp=pp, vp=vp, dp=dp, sp=sp), {}))
    return found + UNEVEN.get(world, [])


UNEVEN: dict[int, list[Layout]] = {
    2: [
        (Topology(pp=2), {"first_layers": 1}),
        (Topology(pp=2), {"embedding": True}),
        (Topology(pp=2, vp=2), {"layout": "E|tt|t|ttL"}),
    ],
    3: [(Topology(pp=3), {"first_layers": 1, "last_layers": 2}), (Topology(pp=3), {"layout": "Et*4|t|L"})],
    4: [(Topology(pp=2, tp=2, sp=True), {"last_layers": 1}), (Topology(pp=2, cp=2), {"layout": "E|tttttL"})],
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return ragged_batch()


@pytest.fixture(scope="module")
def reference(tiny_folders: dict[Tiny, Path], batch: Batch) -> list[dict[HookPoint, torch.Tensor]]:
    return transformers_sites(tiny_folders[TINY_MODEL], batch)


@pytest.fixture(scope="module")
def one_rank(tiny_folders: dict[Tiny, Path], batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> list[States]:
    from nemo_qwen_hidden.parallel.launch import run_ranks

    arguments = ([(Topology(), {})], tiny_folders[TINY_MODEL], batch, OPTIONS)
    log = tmp_path_factory.mktemp("one") / "ranks.log"
    ((found,),) = run_ranks(in_each_layout, arguments, world=1, log=log)
    return found


@pytest.fixture(scope="module")
def same_sums(one_rank: list[States]) -> dict[tuple[int, int, bool], list[States]]:
    """By (tp, cp, sp), the first states that were seen: of all settings, these alone reorder sums."""
    return {(1, 1, False): one_rank}


def test_there_are_at_least_forty() -> None:
    assert sum(len(layouts(world)) for world in range(1, MOST_RANKS + 1)) >= 40


def batches() -> list[tuple[int, list[Layout]]]:
    """Some layouts at a time, all of as many ranks."""
    every = [(world, layouts(world)) for world in range(1, MOST_RANKS + 1)]
    return [
        (world, found[start : start + AT_ONCE]) for world, found in every for start in range(0, len(found), AT_ONCE)
    ]


@pytest.mark.parametrize(("world", "todo"), batches())
def test_each_gives_the_states_of_transformers(
    start_ranks: Start,
    tiny_folders: dict[Tiny, Path],
    batch: Batch,
    reference: list[dict[HookPoint, torch.Tensor]],
    one_rank: list[States],
    same_sums: dict[tuple[int, int, bool], list[States]],
    world: int,
    todo: list[Layout],
) -> None:
    everyone = start_ranks(world, in_each_layout, todo, tiny_folders[TINY_MODEL], batch, OPTIONS)
    for layout, found in zip(todo, everyone[0], strict=True):
        topology = layout[0]
        alike = same_sums.setdefault((topology.tp, topology.cp, topology.sp), found)
        for states, first, alone in zip(found, alike, one_rank, strict=True):
            _check(layout, states, reference, batch)
            assert all(np.array_equal(states[point], first[point]) for point in first), layout
            other = [point for point in alone if not np.array_equal(states[point], alone[point])]
            print(f"{topology} {layout[1] or ''}: {len(other)} of {len(alone)} hook points in other bits")


def _check(layout: Layout, states: States, reference: list[dict[HookPoint, torch.Tensor]], batch: Batch) -> None:
    assert set(states) == set(reference[0])
    for index, (length, expected) in enumerate(zip(batch.lengths, reference, strict=True)):
        for point, state in expected.items():
            ours = torch.from_numpy(states[point][index])
            assert not ours[length:].any(), (layout, point)
            ours = ours[:length]
            if point.site == ATTN_WEIGHTS:
                assert not ours[..., length:].any(), (layout, point)
                ours = ours[..., :length]
            error = relative_error(ours.flatten(1), state.flatten(1))
            assert error < BOUND, (layout, str(point), index, error)
