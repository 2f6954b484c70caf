"""Local layers on a CPU over more rows than they take at a time: what is computed, and that it is so whoever looks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.plan.footprint import MLP_ROWS
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import Batch, Tiny, ragged_batch, relative_error, save_tiny, transformers_states
from tests.support.ranks import gathered, with_and_without_gradients

LENGTHS = (MLP_ROWS + 77, 40, MLP_ROWS // 2)
INSIDE = ("mlp_act@0", "mlp_act@2", "q@1", "rot_k@0", "z@2", "attn_out@1", "mlp_out@1", "resid_mid@2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Batch]:
    folder = tmp_path_factory.mktemp("local") / "model"
    save_tiny(folder, Tiny(layers=3, groups=2, tied=True), max_position_embeddings=2 * MLP_ROWS)
    return folder, ragged_batch(LENGTHS)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2), Topology(tp=2, sp=True), Topology(cp=2)], ids=str)
def test_states_are_those_of_transformers_and_do_not_depend_on_what_else_is_asked_for(
    topology: Topology, dtype: str, model: tuple[Path, Batch], start_ranks: Start
) -> None:
    folder, batch = model
    asked: list[dict[str, Any]] = [
        {"packing": packing, "hook_points": ("all", "final_norm", *more)}
        for packing in (True, False)
        for more in ((), INSIDE)
    ]
    ((found,), *_) = start_ranks(topology.world, gathered, topology, [folder], batch, asked, dtype)
    for alone, beside in zip(found[::2], found[1::2], strict=True):
        for point, states in alone.items():
            assert np.array_equal(states, beside[point]), point
    exact = transformers_states(folder, batch)
    theirs = transformers_states(folder, batch, torch.bfloat16)
    for states in found[::2]:
        for row, length in enumerate(batch.lengths):
            for point, state in states.items():
                error = relative_error(torch.from_numpy(state[row, :length]), exact[row][point])
                bound = 5e-6 if dtype == "fp32" else 1.2 * relative_error(theirs[row][point], exact[row][point])
                assert error <= bound, (point, row)


def test_with_gradients_megatron_computes_the_same(model: tuple[Path, Batch], start_ranks: Start) -> None:
    folder, batch = model
    ((without, with_gradients),) = start_ranks(1, with_and_without_gradients, folder, batch)
    assert relative_error(torch.from_numpy(without), torch.from_numpy(with_gradients)) <= 5e-6
