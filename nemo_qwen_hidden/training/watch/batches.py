"""What a batch of a NeMo data module says: tokens, how many of them are no padding, and which samples they are.

B: sequences of a microbatch, S: tokens of the sequence axis, padding included.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.plan.microbatches import Microbatch, Segment

Lengths = Callable[[Mapping[str, Any]], Sequence[int]]
"""From a batch to the number of tokens of each of its samples, padding not counted."""


class Noted:
    """An iterator that gives what another gives, and notes it."""

    def __init__(self, data: Iterator[Any]) -> None:
        self._data = data
        self.batches: list[Any] = []

    def __iter__(self) -> "Noted":
        return self

    def __next__(self) -> Any:
        batch = next(self._data)
        self.batches.append(batch)
        return batch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """token_ids: [B, S] integers on the CPU, padded on the right. lengths: tokens of each sequence."""

    token_ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, given: Any, lengths: Lengths | None, *, cp: int) -> "Batch":
        """What ``given`` says, which is what NeMo's data loaders give: a dict, or one with its number and its loader's.

        Raises:
            ConfigError: there are no tokens in it, or no word of how much is padding where there may be some, or
                packed sequences under context parallelism.
        """
        batch = given[0] if isinstance(given, tuple) and len(given) == 3 else given
        tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            rule = "must give dicts with `tokens` [batch, tokens], as NeMo's data modules for language models do"
            raise ConfigError("the data module", rule, type(batch).__name__)
        if "cu_seqlens" in batch and cp > 1:
            rule = "must be 1 while packed sequences are captured: NeMo does not cut them document by document"
            raise ConfigError("context_parallel_size", rule, cp)
        found = tuple(int(length) for length in (lengths or lengths_of)(batch))
        if len(found) != len(tokens) or not all(1 <= length <= tokens.shape[1] for length in found):
            rule = f"must be {len(tokens)} whole numbers from 1 to {tokens.shape[1]}"
            raise ConfigError("lengths of a batch", rule, list(found))
        return cls(token_ids=tokens.cpu(), lengths=found)

    def split(self, parts: int) -> list["Batch"]:
        """As many microbatches, of the sequences in their order."""
        size = len(self.lengths) // parts
        return [
            Batch(token_ids=self.token_ids[start : start + size], lengths=self.lengths[start : start + size])
            for start in range(0, size * parts, size)
        ]

    def microbatch(self, index: int, first_rows: Sequence[int]) -> Microbatch:
        """With sequence b at the rows from ``first_rows[b]`` on."""
        segments = (Segment(first_row=row, length=n) for row, n in zip(first_rows, self.lengths, strict=True))
        return Microbatch(index=index, segments=tuple(segments), tokens=self.token_ids.shape[1], packed=False)


def lengths_of(batch: Mapping[str, Any]) -> Sequence[int]:
    """How many tokens each sample of a batch has, as the batch itself says.

    ``lengths`` says just that. In NeMo 2.7.3 (``llm/gpt/data/core.py``) ``token_count`` says it of a packed sample
    (line 783), whose padding is at its end; of another it counts one token more (line 614), since the token that is
    predicted last is no input. A batch without padding needs to say nothing.

    Raises:
        ConfigError: a batch of NeMo's chat data, which is padded and does not say how far.
    """
    if "lengths" in batch:
        return [int(length) for length in batch["lengths"]]
    if "token_count" in batch:
        beyond = 1 if "contexts" in batch else 0
        return [int(count) - beyond for count in batch["token_count"]]
    if "contexts" in batch:
        rule = "must say how many tokens each sample has: give `lengths`, a function of the batch (or `whole_length`)"
        raise ConfigError("the batches", rule, f"padded ones with {', '.join(sorted(batch))}")
    return whole_length(batch)


def whole_length(batch: Mapping[str, Any]) -> Sequence[int]:
    """Every token of the batch, padding among them, as it went through the model."""
    count, tokens = batch["tokens"].shape
    return [tokens] * count


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """Which samples the microbatches of a step are, by Megatron's samplers.

    consumed: samples before this step, over all replicas. micro_batch_size: of one replica. replicas: data-parallel
    ranks. strided: NeMo's sampler of whole batches (``dataloader_type="batch"``, in NeMo 2.7.3
    ``data_samplers.py:368``) deals the samples of a global batch out one by one; the others give each replica
    ``micro_batch_size`` of them at a time.
    """

    consumed: int
    micro_batch_size: int
    microbatches: int
    replicas: int
    strided: bool

    @property
    def samples(self) -> int:
        """Of the whole step."""
        return self.micro_batch_size * self.microbatches * self.replicas

    def numbers(self, microbatch: int, replica: int) -> tuple[int, ...]:
        """The samples of one replica's microbatch, in its order."""
        within = range(microbatch * self.micro_batch_size, (microbatch + 1) * self.micro_batch_size)
        if self.strided:
            return tuple(self.consumed + place * self.replicas + replica for place in within)
        start = self.consumed + (microbatch * self.replicas + replica) * self.micro_batch_size
        return tuple(range(start, start + self.micro_batch_size))


def tokens_on(spans: Sequence[range], token_ids: Tensor) -> Tensor:
    """[B, S] to [B, C]: the tokens that lie on ``spans``."""
    return torch.cat([token_ids[:, span.start : span.stop] for span in spans], dim=1)
