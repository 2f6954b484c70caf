"""Real weights (Qwen2.5-Coder-0.5B-Instruct) on real text: every hook point, against transformers.

``make real`` fetches the weights and sets NQH_REAL_MODEL.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import Batch, transformers_states
from tests.support.ranks import gathered, loaded

pytestmark = pytest.mark.real

BOUND = 5e-6
LAYOUTS = [
    Topology(),
    Topology(tp=2),
    Topology(pp=2),
    Topology(pp=3),
    Topology(tp=2, sp=True),
    Topology(tp=2, pp=2),
    Topology(tp=2, pp=2, sp=True),
    Topology(dp=2),
    Topology(tp=2, dp=2),
]
States = list[dict[HookPoint, torch.Tensor]]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(os.environ["NQH_REAL_MODEL"])


@pytest.fixture(scope="module")
def batch(folder: Path) -> Batch:
    """Three ragged pieces of the standard library's own sources."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, fix_mistral_regex=False)
    source = inspect.getsource(json)
    encoded = [tokenizer(source[start:stop])["input_ids"] for start, stop in ((0, 700), (1500, 1750), (3000, 3060))]
    lengths = tuple(len(ids) for ids in encoded)
    padded = [[*ids, *[tokenizer.pad_token_id] * (max(lengths) - len(ids))] for ids in encoded]
    return Batch(torch.tensor(padded), lengths)


@pytest.fixture(scope="module")
def truth(folder: Path, batch: Batch) -> States:
    return transformers_states(folder, batch)


def errors(states: dict[HookPoint, Any], reference: States, batch: Batch) -> dict[HookPoint, float]:
    """Relative norm error of each hook point over all tokens of the batch."""
    found = {}
    for point, values in states.items():
        ours = torch.cat([torch.as_tensor(values[row][:length]) for row, length in enumerate(batch.lengths)]).double()
        theirs = torch.cat([states[point] for states in reference]).double()
        found[point] = float((ours - theirs).norm() / theirs.norm())
    return found


@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
def test_every_hook_point_in_fp32(
    topology: Topology, folder: Path, batch: Batch, truth: States, start_ranks: Start, record_property: Any
) -> None:
    ((states,),) = start_ranks(topology.world, gathered, topology, [folder], batch, ({},))[0]
    found = errors(states, truth, batch)
    record_property("largest_relative_norm_error", max(found.values()))
    print(f"{topology}: largest relative norm error {max(found.values()):.2e}")
    assert len(found) == 26
    assert max(found.values()) <= BOUND


def test_bf16_is_as_close_to_fp32_as_transformers_is(
    folder: Path, batch: Batch, truth: States, start_ranks: Start
) -> None:
    theirs_bf16 = transformers_states(folder, batch, torch.bfloat16)
    theirs = errors(
        {point: [states[point].float() for states in theirs_bf16] for point in theirs_bf16[0]}, truth, batch
    )
    ((states,),) = start_ranks(1, gathered, Topology(), [folder], batch, ({},), "bf16")[0]
    ours = errors(states, truth, batch)
    for point in truth[0]:
        print(f"{point}: {ours[point]:.4f} here, {theirs[point]:.4f} by transformers")
    assert all(ours[point] <= 1.2 * theirs[point] for point in truth[0])


def test_a_rank_reads_its_own_weights_and_little_more(folder: Path, start_ranks: Start) -> None:
    """Peak of a rank's own memory: its parameters plus its part of one tensor, and what Python and Megatron allocate
    beside; no output layer on any stage."""
    embedding_part_bytes = 151936 * 896 * 4 // 2
    for own, growth, names in start_ranks(4, loaded, Topology(tp=2, pp=2), folder, "fp32"):
        assert growth <= own + embedding_part_bytes + 64 * 2**20
        assert not any("output_layer" in name for name in names)
