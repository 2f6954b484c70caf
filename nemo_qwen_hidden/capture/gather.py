"""Bringing local slices together: on one rank, or as a tensor per hook point.

What each rank holds follows from the microbatches and the topology alone, so nothing is negotiated: sender and
receiver walk the same list in the same order.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_qwen_hidden.capture.rows import view_of
from nemo_qwen_hidden.capture.taps import Capture, LocalSlice
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.plan.microbatches import Microbatch, replica_of
from nemo_qwen_hidden.plan.slices import Run
from nemo_qwen_hidden.plan.stages import stage_of
from nemo_qwen_hidden.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A slice that exists somewhere: what it is and which rank has it."""

    hook_point: HookPoint
    microbatch: int
    rank: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class LocalStates:
    """The states that one rank holds, without gathering: values [n, width], and for each row the index of its
    sequence in the batch and its position there, both int64 [n]."""

    values: Tensor
    sequence: Tensor
    position: Tensor


def on_host(piece: LocalSlice) -> LocalSlice:
    """The same slice in the CPU's memory."""
    return replace(piece, values=piece.values.cpu(), divisor=None if piece.divisor is None else piece.divisor.cpu())


class SliceBuffer:
    """A sink that keeps slices in the CPU's memory until they are asked for."""

    def __init__(self) -> None:
        self._slices: dict[tuple[HookPoint, int], LocalSlice] = {}

    def __call__(self, piece: LocalSlice) -> None:
        self._slices[piece.hook_point, piece.microbatch] = on_host(piece)

    def take(self, point: HookPoint, microbatch: int) -> LocalSlice:
        """Hands a slice over and forgets it."""
        return self._slices.pop((point, microbatch))

    def of(self, point: HookPoint) -> list[LocalSlice]:
        """Slices of one hook point, in the order of the microbatches."""
        pieces = [piece for (kept, _), piece in self._slices.items() if kept == point]
        return sorted(pieces, key=lambda piece: piece.microbatch)


def holdings(
    microbatches: Iterable[Microbatch], capture: Capture, stages: Sequence[range], topology: Topology
) -> Iterator[Holding]:
    """Every slice of these microbatches and the rank that has it, in one order that all ranks agree on."""
    for microbatch in microbatches:
        views = [view_of(microbatch, topology, cp=cp, tp=0, choice=capture.choice) for cp in range(topology.cp)]
        dp = replica_of(microbatch, topology.dp)
        for point in capture.points:
            pp = stage_of(point, stages) % topology.pp
            for cp, view in enumerate(views):
                for tp, runs in enumerate(view.stripes):
                    if runs:
                        rank = topology.rank(tp=tp, cp=cp, dp=dp, pp=pp)
                        yield Holding(hook_point=point, microbatch=microbatch.index, rank=rank, runs=runs)


def gather_slices(
    held: SliceBuffer,
    expected: Iterable[Holding],
    groups: ProcessGroups,
    *,
    widths: Mapping[HookPoint, int],
    dtype: torch.dtype,
    divisors: bool = True,
) -> Iterator[LocalSlice]:
    """Yields every slice of ``expected`` on rank 0, one at a time, on the CPU; nothing on the others. Collective over
    all ranks: has to be run to its end on each. widths: numbers in one token's state. divisors: whether those of the
    final norm come with its states.

    Goes over the control group, whose patience outlasts a slow disk behind rank 0.
    """
    rank = groups.place.rank
    for holding in expected:
        if rank == 0 and holding.rank == 0:
            yield held.take(holding.hook_point, holding.microbatch)
        elif rank == 0:
            rows = sum(run.kept for run in holding.runs)
            values = torch.empty(rows, widths[holding.hook_point], dtype=dtype)
            divisor = torch.empty(rows) if holding.hook_point.normed and divisors else None
            for tensor in (values, divisor):
                if tensor is not None:
                    dist.recv(tensor, group=groups.control, group_src=holding.rank)
            yield LocalSlice(
                hook_point=holding.hook_point,
                microbatch=holding.microbatch,
                runs=holding.runs,
                values=values,
                divisor=divisor,
            )
        elif rank == holding.rank:
            piece = held.take(holding.hook_point, holding.microbatch)
            for tensor in (piece.values, piece.divisor):
                if tensor is not None:
                    dist.send(tensor, group=groups.control, group_dst=0)


class BatchAssembler:
    """Puts rows back where their tokens stood in a batch of ragged sequences; a row is the token's number among all
    tokens of the batch, sequence after sequence, padding not counted."""

    def __init__(self, lengths: Sequence[int], tokens: int) -> None:
        self._lengths, self._tokens = lengths, tokens
        self._first_rows = list(accumulate(lengths, initial=0))[:-1]

    def place_of(self, row: int) -> tuple[int, int]:
        """Sequence and position of a row."""
        sequence = bisect_right(self._first_rows, row) - 1
        return sequence, row - self._first_rows[sequence]

    def assemble(
        self, slices: Iterable[LocalSlice], widths: Mapping[HookPoint, int], like: Tensor
    ) -> dict[HookPoint, Tensor]:
        """{hook point: [batch, tokens, width]}, zero where nothing was kept; dtype and device of ``like``."""
        size = (len(self._lengths), self._tokens)
        whole = {point: like.new_zeros(*size, width) for point, width in widths.items()}
        for piece in slices:
            rows = piece.values.split([run.kept for run in piece.runs])
            for run, values in zip(piece.runs, rows, strict=True):
                sequence, position = self.place_of(run.first_row)
                where = slice(position, position + run.length) if run.picked is None else _shifted(run, position)
                whole[piece.hook_point][sequence, where] = values.to(like)
        return whole

    def local(self, held: Mapping[HookPoint, Sequence[LocalSlice]], like: Tensor) -> dict[HookPoint, LocalStates]:
        """What this rank holds itself, with the place of each row."""
        found = {}
        for point, slices in held.items():
            runs = [run for piece in slices for run in piece.runs]
            places = [(*self.place_of(run.first_row), run) for run in runs]
            found[point] = LocalStates(
                values=torch.cat([piece.values.to(like) for piece in slices]),
                sequence=torch.tensor(
                    [sequence for sequence, _, run in places for _ in range(run.kept)], dtype=torch.int64
                ),
                position=torch.cat([_shifted(run, position) for _, position, run in places]),
            )
        return found


def _shifted(run: Run, position: int) -> Tensor:
    """Positions of the kept tokens of a run that begins at ``position``."""
    return position + (torch.arange(run.length) if run.picked is None else torch.tensor(run.picked))
