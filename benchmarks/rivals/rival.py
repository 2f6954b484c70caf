"""What a contestant does, and what those have in common that run padded batches of documents sorted by length.

B: documents of a batch, S: tokens of its longest, padding at their right included, H: hidden size.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.work import BF16, FP32, Case, Choices, Work, probe
from nemo_qwen_hidden.hookpoint import HookPoint

DTYPES = {BF16: torch.bfloat16, FP32: torch.float32}
BUDGETS = (1, 1024, 2048, 4096, 8192)
"""Tokens of a batch, padding included, that are tried: with 1 every document is a batch."""
PROBED_LAYERS = 2

Found = Iterator[tuple[int, HookPoint, Tensor]]
"""A document's number, a hook point, and its states there, [tokens wanted, H]."""


class Contestant(ABC):
    """One way of doing ``work``; whoever makes it has the model loaded when it is made."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def choose(self, folder: Path) -> Choices:
        """Tries out, once, what there is to choose from, with ``folder`` to write to."""
        return {}

    @abstractmethod
    def run(self, case: Case, documents: Sequence[int], folder: Path) -> float:
        """Writes what ``case`` asks for of these documents into the new ``folder``; the seconds that it took."""

    @abstractmethod
    def read(self, case: Case, documents: Sequence[int], folder: Path) -> Found:
        """What ``run`` has written."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """documents: their numbers. ids: [B, S]. lengths: without padding."""

    documents: tuple[int, ...]
    ids: Tensor
    lengths: tuple[int, ...]

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """Indices of each document's last token."""
        return torch.arange(len(self.lengths)), torch.tensor(self.lengths) - 1

    def without_padding(self, states: Tensor) -> Tensor:
        """[B, S, H] to [tokens, H]."""
        if min(self.lengths) == states.shape[1]:
            return states.flatten(0, 1)
        return torch.cat([state[:length] for state, length in zip(states, self.lengths, strict=True)])


def batch_of(work: Work, documents: Sequence[int]) -> Batch:
    """Padded on the right with token 0, which no token before it can see."""
    ids = [torch.tensor(work.documents[number]) for number in documents]
    return Batch(
        documents=tuple(documents), ids=pad_sequence(ids, batch_first=True), lengths=tuple(len(each) for each in ids)
    )


def sorted_batches(work: Work, documents: Sequence[int], budget: int) -> Iterator[Batch]:
    """Longest documents first, as many as ``budget`` tokens hold with their padding, or one."""
    members: list[int] = []
    for number in sorted(documents, key=lambda number: -len(work.documents[number])):
        if members and len(work.documents[members[0]]) * (len(members) + 1) > budget:
            yield batch_of(work, members)
            members = []
        members.append(number)
    if members:
        yield batch_of(work, members)


class SortedRival(Contestant):
    """Runs batches of a token budget that was chosen by trying, of documents sorted by length, stops after the deepest
    layer that is wanted, norms the tokens that are wanted, and saves those alone."""

    budget = BUDGETS[0]

    @abstractmethod
    def residuals(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The residual stream after each of these layers (ascending), [B, S, H], for ``ids`` [B, S]."""

    @abstractmethod
    def norm(self, states: Tensor) -> Tensor:
        """The final norm of [..., H]."""

    def choose(self, folder: Path) -> Choices:
        everything, seconds = range(len(self.work.documents)), {}
        self.run(probe(1), everything[:1], folder / "warm")
        for budget in BUDGETS:
            self.budget = budget
            seconds[budget] = self.run(probe(PROBED_LAYERS), everything, folder / str(budget))
        self.budget = min(seconds, key=lambda budget: seconds[budget])
        return {"batch": "one document" if self.budget == 1 else f"{self.budget} tokens"}

    def run(self, case: Case, documents: Sequence[int], folder: Path) -> float:
        folder.mkdir()
        start = time.perf_counter()
        with torch.inference_mode():
            for number, batch in enumerate(sorted_batches(self.work, documents, self.budget)):
                save_file(self._states(case, batch), folder / f"{number}.safetensors")
        return time.perf_counter() - start

    def _states(self, case: Case, batch: Batch) -> dict[str, Tensor]:
        layers = [*case.residuals, case.layers - 1] if case.normed else case.residuals
        states = self.residuals(batch.ids, layers)
        if case.last:
            wanted = [state[batch.last] for state in states]
        else:
            wanted = [batch.without_padding(state) for state in states]
        if case.normed:
            wanted[-1] = self.norm(wanted[-1])
        return {str(point): state for point, state in zip(case.points, wanted, strict=True)}

    def read(self, case: Case, documents: Sequence[int], folder: Path) -> Found:
        for number, batch in enumerate(sorted_batches(self.work, documents, self.budget)):
            states = load_file(folder / f"{number}.safetensors")
            sizes = [len(case.tokens_of(length)) for length in batch.lengths]
            for point in case.points:
                for document, part in zip(batch.documents, states[str(point)].split(sizes), strict=True):
                    yield document, point, part
