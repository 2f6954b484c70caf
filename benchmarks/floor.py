"""The time of the matrix products alone that a case needs: the floor under every way of computing it.

Linear layers run over the real tokens of our microbatches, with the matrices that are fewest and largest: queries, keys
and values in one product, gate and up in one. Attention's two products run document by document at their causal cost:
queries in blocks, each with as many keys as its queries see on average. Operands and results are allocated before, and
nothing else is computed: no norm, softmax, activation, addition, copy or write.

T: tokens of a microbatch, S: of a document, H: hidden size.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rivals.rival import DTYPES, Contestant, Found
from benchmarks.work import Case, Work
from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.config import DataSettings
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.plan.microbatches import Batching, plan

TIMED_LAYERS = 2
"""Layers whose products are run, each with weights of its own; the time is scaled to the layers of the case."""
QUERIES = 128
"""Queries of a block: scores of 14 heads x 128 queries x 2,048 keys in fp32 take 15 MB, which caches hold."""


def linear_shapes(shape: DecoderShape) -> list[tuple[int, int]]:
    """(in, out) features of a decoder layer's linear layers."""
    heads, groups = shape.num_heads * shape.head_dim, 2 * shape.num_query_groups * shape.head_dim
    hidden, inner = shape.hidden_size, shape.ffn_hidden_size
    return [(hidden, heads + groups), (heads, hidden), (hidden, 2 * inner), (inner, hidden)]


def causal_blocks(length: int) -> Iterator[tuple[int, int, int]]:
    """First query, end of the queries, and keys of each block of a document."""
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        yield start, stop, (start + stop + 1) // 2


def flops(shape: DecoderShape, lengths: Sequence[int]) -> tuple[int, int]:
    """Multiplications and additions of one decoder layer over documents of these lengths: of its linear layers, and of
    attention."""
    linear = sum(2 * features * out for features, out in linear_shapes(shape)) * sum(lengths)
    pairs = sum((stop - start) * keys for length in lengths for start, stop, keys in causal_blocks(length))
    return linear, 4 * shape.num_heads * shape.head_dim * pairs


class Floor(Contestant):
    """Writes nothing, and so has nothing to be read."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.shape = read_architecture(work.model).shape
        self.products = Products(self.shape, DTYPES[work.dtype])

    def run(self, case: Case, documents: Sequence[int], folder: Path) -> float:
        lengths = [len(self.work.documents[number]) for number in documents]
        seconds = self.products.seconds(_microbatches(lengths))
        return seconds * case.layers / TIMED_LAYERS

    def read(self, case: Case, documents: Sequence[int], folder: Path) -> Found:
        return iter(())


def _microbatches(lengths: Sequence[int]) -> list[list[int]]:
    """Lengths of the documents of each microbatch, as ``extract`` packs them by default."""
    batching = Batching(max_tokens=max(lengths), batch_tokens=DataSettings().batch_tokens, packing=True)
    return [[segment.length for segment in microbatch.segments] for microbatch in plan(lengths, batching)]


class Products:
    """The products of ``TIMED_LAYERS`` decoder layers."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.layers = [
            [self._random(out, features) for features, out in linear_shapes(shape)] for _ in range(TIMED_LAYERS)
        ]

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size).to(self.dtype) / size[-1] ** 0.5

    def seconds(self, microbatches: Sequence[Sequence[int]]) -> float:
        """For microbatches of documents of these lengths."""
        heads, size = self.shape.num_heads, self.shape.head_dim
        most, longest = max(map(sum, microbatches)), max(map(max, microbatches))
        inputs = [self._random(most, features) for features, _ in linear_shapes(self.shape)]
        outputs = [torch.zeros(most, out, dtype=self.dtype) for _, out in linear_shapes(self.shape)]
        query, key, value, mixed = (self._random(heads, longest, size) for _ in range(4))
        scores = torch.zeros(heads * QUERIES * longest, dtype=self.dtype)
        start = time.perf_counter()
        for lengths in microbatches:
            tokens = sum(lengths)
            for weights in self.layers:
                for weight, given, out in zip(weights, inputs, outputs, strict=True):
                    torch.mm(given[:tokens], weight.t(), out=out[:tokens])
                for length in lengths:
                    for first, stop, keys in causal_blocks(length):
                        block = scores[: heads * (stop - first) * keys].view(heads, stop - first, keys)
                        torch.bmm(query[:, first:stop], key[:, :keys].transpose(1, 2), out=block)
                        torch.bmm(block, value[:, :keys], out=mixed[:, : stop - first])
        return time.perf_counter() - start
