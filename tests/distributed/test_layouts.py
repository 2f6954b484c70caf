"""Every layout gives the states that transformers gives, and those that move no sum give the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import Batch, Tiny, ragged_batch, relative_error, transformers_states
from tests.support.ranks import gathered

BOUND = 5e-6
OPTIONS = ({}, {"packing": False, "batch_tokens": 64}, {"batch_tokens": 8})

LAYOUTS = [
    Topology(),
    Topology(tp=2),
    Topology(tp=4),
    Topology(tp=2, sp=True),
    Topology(tp=4, sp=True),
    Topology(pp=2),
    Topology(pp=3),
    Topology(tp=2, pp=2),
    Topology(tp=2, pp=2, sp=True),
    Topology(dp=2),
    Topology(tp=2, dp=2),
    Topology(pp=2, dp=2),
]
States = dict[HookPoint, np.ndarray]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return ragged_batch()


@pytest.fixture(scope="module")
def reference(tiny_folders: dict[Tiny, Path], batch: Batch) -> dict[Tiny, list[dict[HookPoint, torch.Tensor]]]:
    return {tiny: transformers_states(folder, batch) for tiny, folder in tiny_folders.items()}


@pytest.fixture(scope="module")
def one_rank(
    tiny_folders: dict[Tiny, Path], batch: Batch, tmp_path_factory: pytest.TempPathFactory
) -> dict[Tiny, list[States]]:
    from nemo_qwen_hidden.parallel.launch import run_ranks

    log = tmp_path_factory.mktemp("one_rank") / "ranks.log"
    arguments = (Topology(), list(tiny_folders.values()), batch, OPTIONS)
    (found,) = run_ranks(gathered, arguments, world=1, log=log)
    return dict(zip(tiny_folders, found, strict=True))


@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
def test_states_are_those_of_transformers(
    topology: Topology,
    tiny_folders: dict[Tiny, Path],
    batch: Batch,
    reference: dict[Tiny, Any],
    one_rank: dict[Tiny, list[States]],
    start_ranks: Start,
) -> None:
    fitting = {t: f for t, f in tiny_folders.items() if t.groups % topology.tp == 0 and t.layers >= topology.pp}
    assert fitting
    ranks = start_ranks(topology.world, gathered, topology, list(fitting.values()), batch, OPTIONS)
    assert all(states == {} for found in ranks[1:] for of_model in found for states in of_model)  # gathered on rank 0
    for tiny, of_model in zip(fitting, ranks[0], strict=True):
        for alone, states in zip(one_rank[tiny], of_model, strict=True):
            assert len(states) == tiny.layers + 2
            _check_against_transformers(states, reference[tiny], batch)
            if topology.tp == 1:  # stages and replicas reorder no sum
                assert all(np.array_equal(states[point], alone[point]) for point in states)


def _check_against_transformers(states: States, reference: list[dict[HookPoint, torch.Tensor]], batch: Batch) -> None:
    for point, values in states.items():
        for row, length in enumerate(batch.lengths):
            assert relative_error(torch.from_numpy(values[row, :length]), reference[row][point]) <= BOUND, point
            assert not values[row, length:].any()
