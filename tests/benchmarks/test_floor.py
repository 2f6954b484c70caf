"""The floor does the products that a Qwen2 of transformers does, no more and no fewer."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floor import TIMED_LAYERS, Products, causal_blocks, flops
from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from tests.support.models import TINY, Tiny


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 1000])
def test_causal_cost_is_half(length: int) -> None:
    blocks = list(causal_blocks(length))
    assert [first for first, _, _ in blocks] + [length] == [0, *(stop for _, stop, _ in blocks)]
    pairs = sum((stop - first) * keys for first, stop, keys in blocks)
    assert length**2 / 2 <= pairs <= length * (length + 1) / 2


def test_flops_are_those_of_transformers(tiny_folders: dict[Tiny, Path]) -> None:
    """Attention without a kernel of its own, as torch can count it, computes what the causal mask hides: twice as much.
    Its products have a batch, and so has the one by which transformers makes rotary angles."""
    from transformers import AutoModel

    folder, lengths = tiny_folders[TINY[0]], (64, 17)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    counts: Counter[str] = Counter()
    for length in lengths:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
        counts.update({str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()})
    shape = read_architecture(folder).shape
    linear, attention = flops(shape, lengths)
    angles = sum(lengths) * shape.head_dim
    assert counts["aten.mm"] + counts["aten.addmm"] == TINY[0].layers * linear
    assert (counts["aten.bmm"] - angles) / 2 == pytest.approx(TINY[0].layers * attention, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_is_what_is_counted(dtype: torch.dtype, tiny_folders: dict[Tiny, Path]) -> None:
    shape, microbatches = read_architecture(tiny_folders[TINY[0]]).shape, [[200, 3], [150]]
    products = Products(shape, dtype)
    with FlopCounterMode(display=False) as counter:
        assert products.seconds(microbatches) > 0
    assert counter.get_total_flops() == TIMED_LAYERS * sum(flops(shape, [200, 3, 150]))
