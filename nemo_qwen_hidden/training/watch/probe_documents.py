"""The documents of a fixed probe set: read once, and the same at every step, cut into microbatches by their lengths."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch

from nemo_qwen_hidden.capture.rows import Choice
from nemo_qwen_hidden.capture.taps import LocalSlice
from nemo_qwen_hidden.config import TokenSettings
from nemo_qwen_hidden.data.selector import Selector
from nemo_qwen_hidden.data.sources import read_documents
from nemo_qwen_hidden.data.tokenize import require_tokens, tokenize
from nemo_qwen_hidden.data.tokenizer import Tokenizer
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.plan.microbatches import Batching, Microbatch, plan, replica_of
from nemo_qwen_hidden.plan.selection import keeps_everything
from nemo_qwen_hidden.topology import Place
from nemo_qwen_hidden.training.watch.step_states import ROW_STRIDE, Sample


def check_tokens(tokens: TokenSettings) -> None:
    """Whether the tokens that are kept can be told document by document, before there are states.

    Raises:
        ConfigError: means, a norm that states must not exceed, or a draw of all documents together.
    """
    refused = {
        "pool": (tokens.pool, "none"),
        "max_norm": (tokens.max_norm, None),
        "sample_of": (tokens.sample_of, "document"),
    }
    for name, (given, only) in refused.items():
        if given != only:
            raise ConfigError(f"tokens.{name}", f"must be {only} for a probe set", given)


def read_samples(
    path: str,
    tokenizer: Callable[[], Tokenizer],
    tokens: TokenSettings,
    *,
    vocab_size: int,
    most: int | None,
    fields: dict[str, Any],
) -> tuple[Sample, ...]:
    """The first ``most`` documents of ``path``, numbered from 0. fields: where records hold what, as
    ``data.sources.read_documents`` takes them.

    Raises:
        DataError: documents that cannot be used, or not one token.
    """
    selector = None if keeps_everything(tokens) else Selector(tokens, tokenizer)
    documents = tokenize(
        islice(read_documents(path, **fields), most),
        tokenizer,
        vocab_size=vocab_size,
        assistant=tokens.keep == "assistant",
    )
    samples = []
    for number, document in enumerate(documents):
        kept = None
        if selector is not None:
            chosen = selector.kept(document)
            kept = np.arange(len(document.token_ids), dtype=np.int64) if chosen is None else chosen
        samples.append(
            Sample(number=number, id=document.id, token_ids=document.token_ids, source=document.source, kept=kept)
        )
    require_tokens(sum(len(sample.token_ids) for sample in samples), path)
    return tuple(samples)


@dataclass(frozen=True, kw_only=True)
class ProbeDocuments:
    """The samples of a probe set on one rank, and how the ranks divide them. Rows count the tokens of all samples.

    batching: windows and microbatches, as of an extraction.
    """

    samples: tuple[Sample, ...]
    batching: Batching

    @cached_property
    def _first_rows(self) -> list[int]:
        return list(accumulate((len(sample.token_ids) for sample in self.samples), initial=0))

    @cached_property
    def _token_ids(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([sample.token_ids for sample in self.samples])).long()

    def microbatches(self, place: Place) -> Iterator[Microbatch]:
        """Those that the data-parallel replica at ``place`` runs."""
        lengths = [len(sample.token_ids) for sample in self.samples]
        return (each for each in plan(lengths, self.batching) if replica_of(each, place.topology.dp) == place.dp)

    def tokens(self, first_row: int, length: int) -> torch.Tensor:
        """Token ids, int64 [length]."""
        return self._token_ids[first_row : first_row + length]

    def choice(self) -> Choice | None:
        """Which rows are kept, for the taps."""
        if all(sample.kept is None for sample in self.samples):
            return None
        return Choice(kept=self._kept)

    def numbered(self, piece: LocalSlice) -> LocalSlice:
        """A slice whose rows are those of this probe set, as a ``Recorder`` takes it."""
        runs = (replace(run, first_row=self._number(run.first_row)) for run in piece.runs)
        return replace(piece, runs=tuple(runs))

    def _kept(self, first_row: int, length: int) -> Sequence[int]:
        number, position = divmod(self._number(first_row), ROW_STRIDE)
        kept = self.samples[number].kept
        assert kept is not None, "of all samples or of none"
        start, stop = np.searchsorted(kept, (position, position + length))
        offsets: list[int] = (kept[start:stop] - position).tolist()
        return offsets

    def _number(self, row: int) -> int:
        """A row as number of the sample * ROW_STRIDE + position."""
        number = bisect_right(self._first_rows, row) - 1
        return number * ROW_STRIDE + row - self._first_rows[number]
