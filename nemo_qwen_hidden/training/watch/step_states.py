"""What the ranks of a training run have of a captured step, as values, and where it goes in a store."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.capture.gather import on_host
from nemo_qwen_hidden.capture.taps import LocalSlice
from nemo_qwen_hidden.errors import HiddenStatesError
from nemo_qwen_hidden.plan.slices import Run
from nemo_qwen_hidden.store.write.step_files import States, StepTarget
from nemo_qwen_hidden.store.write.steps import StepDocument

ROW_STRIDE = 2**32
"""A row of a slice is sample number * ROW_STRIDE + position: ranks do not know how long samples of others are."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample of a captured step. number: Megatron's own. id: what a store calls it, beneath the step; None: its
    number. token_ids: int32 [tokens]. source: where it came from; None: the phase. kept: int64, the positions of the
    tokens whose states are kept, ascending; None: all, of every sample."""

    number: int
    id: str | None
    token_ids: NDArray[np.int32]
    source: str | None = None
    kept: NDArray[np.int64] | None = None

    def document(self, phase: str) -> StepDocument:
        """As the store of a step of ``phase`` takes it."""
        return StepDocument(
            id=str(self.number) if self.id is None else self.id,
            source=self.source or phase,
            token_ids=np.ascontiguousarray(self.token_ids, np.int32),
            kept=self.kept,
        )


@dataclass(frozen=True, kw_only=True)
class StepStates:
    """What a rank has of one captured step.

    phase: ``train``, ``validation`` or ``probe``. step: optimizer steps that the weights had been given. samples: those
    of this rank's replica, on one or more of its ranks; others may give (). slices: a run of one begins at row
    ``sample number * ROW_STRIDE + position``, and none goes beyond its sample.
    """

    phase: str
    step: int
    samples: tuple[Sample, ...]
    slices: tuple[LocalSlice, ...]

    @property
    def nbytes(self) -> int:
        """Of the states."""
        return sum(piece.values.nbytes for piece in self.slices)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What rank 0 tells all of a step. numbers: of the samples, ascending. first_rows: of each in the step, then their
    sum. kept: rows of the step that have states, None where all have. sync: whether the step is to be made durable."""

    begun: StepTarget
    numbers: Sequence[int]
    first_rows: Sequence[int]
    kept: NDArray[np.int64] | None
    sync: bool

    @classmethod
    def of(cls, begun: StepTarget, samples: Sequence[Sample], *, sync: bool) -> "StepPlan":
        """samples: of the step, ascending."""
        first_rows = list(accumulate((len(sample.token_ids) for sample in samples), initial=0))
        kept = [
            first + sample.kept for sample, first in zip(samples, first_rows, strict=False) if sample.kept is not None
        ]
        return cls(
            begun=begun,
            numbers=[sample.number for sample in samples],
            first_rows=first_rows,
            kept=np.concatenate(kept) if kept else None,
            sync=sync,
        )

    def pieces(self, slices: Iterable[LocalSlice]) -> Iterator[States]:
        """The slices of a rank, as its ``StepFiles`` takes them."""
        target = self.begun.target
        for piece in map(on_host, slices):
            divides = piece.hook_point in target.points and target.entry(piece.hook_point).divisor
            runs = [self._states_of(run) for run in piece.runs]
            divisor = piece.divisor if divides else None
            yield States(point=piece.hook_point, runs=runs, values=piece.values, divisor=divisor)

    def _states_of(self, run: Run) -> Run:
        """The states of a run of rows."""
        number, position = divmod(run.first_row, ROW_STRIDE)
        place = bisect_right(self.numbers, number) - 1
        first_row = self.first_rows[place] + position
        if place < 0 or self.numbers[place] != number or first_row + run.length > self.first_rows[place + 1]:
            rule = f"positions {position} to {position + run.length - 1} of sample {number} were captured"
            raise HiddenStatesError(f"{rule}, which is not among those that ranks have told of, or not as long")
        if self.kept is None:
            first, count = first_row, run.length
        else:
            first, stop = np.searchsorted(self.kept, (first_row, first_row + run.length)).tolist()
            count = stop - first
        if count != run.kept:
            raise HiddenStatesError(f"{run.kept} states of sample {number} were captured where {count} are to be kept")
        return replace(run, first_row=first, length=count, picked=None)


def together(told: Iterable[Sequence[Sample]]) -> list[Sample]:
    """The samples of all ranks, ascending; several of a replica may have told of one."""
    found: dict[int, Sample] = {}
    for sample in (sample for samples in told for sample in samples):
        known = found.setdefault(sample.number, sample)
        if known is not sample and not np.array_equal(known.token_ids, sample.token_ids):
            raise HiddenStatesError(f"ranks have different tokens of sample {sample.number}")
    return [found[number] for number in sorted(found)]
