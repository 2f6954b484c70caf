"""Which rows of a microbatch are kept, and which rank answers for each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_qwen_hidden.plan.microbatches import Microbatch
from nemo_qwen_hidden.plan.slices import Run, runs_within, spans_of, stripe
from nemo_qwen_hidden.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is kept of the rows that are run, where not all of it is.

    kept: (first row, length) to the offsets that are kept among these rows, ascending; None: all. weights: instead of
    that, (first row, length) to what these rows weigh, fp32 [length] on the CPU, in the mean of their segment; the mean
    stands at the segment's last row. None where nothing of the segment is kept.
    """

    kept: Callable[[int, int], Sequence[int] | None] | None = None
    weights: Callable[[int, int], Tensor | None] | None = None


@dataclass(frozen=True, kw_only=True)
class View:
    """What a rank has of a microbatch.

    stripes: for each tp rank the runs that it answers for, of the tokens that this context-parallel rank has. own: this
    rank's. first_index: the index, along those tokens, of the first that this rank has at the residual sites; under
    sequence parallelism that is not 0. residual_runs, all_runs: what this rank has at the residual sites and at the
    others, chosen or not. weights: where means are asked for, of each segment what its rows weigh in its own.
    """

    microbatch: Microbatch
    spans: tuple[range, ...]
    stripes: tuple[tuple[Run, ...], ...]
    own: int
    first_index: int
    residual_runs: tuple[Run, ...]
    all_runs: tuple[Run, ...]
    weights: tuple[Tensor | None, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.stripes[self.own]


def lay_out(rows: Callable[[int, int], Tensor], into_CBH: Tensor, view: View) -> None:
    """Puts what ``rows`` gives for (first row, length), [length, H], where this rank has these tokens at the residual
    sites. C: tokens of this rank, B: sequences, H: hidden."""
    for run in view.residual_runs:
        start = run.index - view.first_index
        into_CBH[start : start + run.length, run.sequence] = rows(run.first_row, run.length).to(into_CBH)


def view_of(microbatch: Microbatch, topology: Topology, *, cp: int, tp: int, choice: Choice | None) -> View:
    """What the rank at these coordinates has of ``microbatch``."""
    spans = spans_of(microbatch, part=cp, parts=topology.cp)
    tokens = microbatch.tokens // topology.cp
    owned = [stripe(tokens, part=part, parts=topology.tp) for part in range(topology.tp)]
    whole = [tuple(runs_within(microbatch, spans, each)) for each in owned]
    all_runs = tuple(run for runs in whole for run in runs)
    weights = _weights(microbatch, choice)
    return View(
        microbatch=microbatch,
        spans=spans,
        stripes=tuple(tuple(_chosen(microbatch, runs, choice, weights)) for runs in whole),
        own=tp,
        first_index=owned[tp].start if topology.sp else 0,
        residual_runs=whole[tp] if topology.sp else all_runs,
        all_runs=all_runs,
        weights=weights,
    )


def _weights(microbatch: Microbatch, choice: Choice | None) -> tuple[Tensor | None, ...]:
    if choice is None or choice.weights is None:
        return ()
    return tuple(choice.weights(segment.first_row, segment.length) for segment in microbatch.segments)


def _chosen(
    microbatch: Microbatch, runs: Sequence[Run], choice: Choice | None, weights: Sequence[Tensor | None]
) -> Iterator[Run]:
    if choice is None:
        yield from runs
    elif choice.weights is not None:
        number_of = microbatch.segment_numbers()
        for run in runs:
            number = number_of(run.first_row)
            segment = microbatch.segments[number]
            shift = segment.first_row + segment.length - 1 - run.first_row
            if shift < run.length and weights[number] is not None:
                yield replace(run, first_row=run.first_row + shift, length=1, index=run.index + shift)
    else:
        assert choice.kept is not None
        for run in runs:
            kept = choice.kept(run.first_row, run.length)
            if kept is None:
                yield run
            elif len(kept):
                yield replace(run, picked=tuple(map(int, kept)))
