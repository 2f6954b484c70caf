"""One rank's part of a job: its stages, its microbatches, its rows into the store, its share of shards finished."""

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.config import BYTES, MEANS
from nemo_qwen_hidden.errors import StoreError, status_of
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.parallel.heap import HeapTrimmer
from nemo_qwen_hidden.parallel.launch import fair_threads
from nemo_qwen_hidden.parallel.watch import Pulse
from nemo_qwen_hidden.plan.microbatches import Microbatch, Segment, plan
from nemo_qwen_hidden.plan.rowset import RowSet, union
from nemo_qwen_hidden.progress import Phase, Progress, Report, silent
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.tokens import PartTokens, TokenTable
from nemo_qwen_hidden.store.write import session
from nemo_qwen_hidden.trace.record import Trace

if TYPE_CHECKING:
    import torch

    from nemo_qwen_hidden.capture.rows import Choice
    from nemo_qwen_hidden.capture.taps import Capture, LocalSlice
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import ProcessGroups
    from nemo_qwen_hidden.store.write.writer import ShardWriter

LENGTHS_AT_ONCE = 65536
MOST_GATHERED_MICROBATCHES = 16
GATHERED_BYTES = 256 * 2**20
Done = Callable[[int], None]
"""Is called with the number of states of a microbatch once this rank has run it."""
KeptRows = Callable[[int, int], NDArray[np.int64]]
Weights = Callable[[int, int], NDArray[np.float32]]
"""(first row, length) to the rows that are kept of these, and to what each of these weighs in a mean."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What there is to do. manifest: what the store is to be. work: what the job does to it, in words; None where
    nothing is left to do. done: states of each hook point that are there already. started: unix time in seconds."""

    manifest: Manifest
    work: str | None
    done: Mapping[HookPoint, RowSet]
    started: float

    @cached_property
    def missing(self) -> RowSet:
        """The states that have to be made: those that some hook point lacks."""
        return union(rows.complement(0, self.manifest.states) for rows in self.done.values())


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """seconds: of computing and writing, without start-up. peak_bytes: the most memory that the process held, files
    that it mapped included."""

    seconds: float
    peak_bytes: int


def run(
    job: Job, begun: Begun, groups: "ProcessGroups", report: Report = silent, pulse: Pulse | None = None
) -> RankResult:
    """One rank's part: builds its stage, runs its microbatches, writes the rows that it holds, finishes its share of
    the shards. Collective over all ranks.

    Args:
        pulse: is told of everything that gets done, for whoever watches this rank.
    """
    import torch

    from nemo_qwen_hidden.parallel.traced import traced

    torch.set_num_threads(job.settings.runtime.threads or fair_threads(job.topology.world))
    place = groups.place
    speaks = place.tp == 0 and place.cp == 0 and place.pp == 0
    start = time.perf_counter()
    with traced(job.trace_path, groups) as trace:
        if len(begun.missing):
            start = _run_missing(job, begun, groups, report if speaks else silent, pulse or Pulse(), trace)
        if speaks:
            report(Phase("finishing shards"))
        _seal(job, begun, groups, trace)
        return RankResult(
            seconds=time.perf_counter() - start,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def load_model(job: Job, groups: "ProcessGroups") -> "Qwen2HiddenModel":
    """This rank's part of the job's model, no deeper than its hook points."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel

    return Qwen2HiddenModel.from_pretrained(
        job.model_folder,
        groups=groups,
        dtype=job.settings.precision.compute,
        num_layers=job.num_layers,
        final_norm=job.final_norm,
        split=job.split,
        adapter=job.adapter_folder,
    )


def _run_missing(job: Job, begun: Begun, groups: "ProcessGroups", report: Report, pulse: Pulse, trace: Trace) -> float:
    """Runs what is missing, until it is durable; the time at which computing began, in seconds of ``perf_counter``."""
    from nemo_qwen_hidden.parallel.agree import wait_for_all

    report(Phase("loading weights"))
    with trace.span("loading weights"):
        model = load_model(job, groups)
    report(Phase("running"))
    wait_for_all(groups)  # so that the time of running counts nobody's start-up
    start, rows, heap = time.perf_counter(), 0, HeapTrimmer()

    def done(states: int) -> None:
        nonlocal rows
        rows += states
        pulse.progressed()
        heap.trim()
        report(Progress(groups.place.dp, rows))

    gathers = job.settings.capture.gather == "rank0"
    with trace.span("running"):
        (_run_gathering if gathers else _run_writing)(job, begun, model, groups, done, pulse, trace)
        with trace.span("wait for all"):
            wait_for_all(groups)
    return start


def _shard_writer(job: Job, begun: Begun, groups: "ProcessGroups", pulse: Pulse, trace: Trace) -> "ShardWriter":
    import torch

    from nemo_qwen_hidden.store.write.writer import ShardWriter

    return ShardWriter(
        job.store_path,
        begun.manifest,
        rank=groups.place.rank,
        done=begun.done,
        nonfinite=job.settings.precision.nonfinite,
        commit_secs=job.settings.store.commit_secs,
        progressed=pulse.progressed,
        sealing_threads=torch.get_num_threads(),
        trace=trace,
    )


def _run_writing(
    job: Job,
    begun: Begun,
    model: "Qwen2HiddenModel",
    groups: "ProcessGroups",
    done: Done,
    pulse: Pulse,
    trace: Trace,
) -> None:
    """Every rank writes what it holds; nothing is sent for it."""
    import torch

    from nemo_qwen_hidden.capture.taps import LocalSlice

    table = _token_table(job, begun)

    def tokens(first_row: int, length: int) -> "torch.Tensor":
        return torch.from_numpy(table.token_id[first_row : first_row + length].astype("int64"))

    def weights(first_row: int, length: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = table.weight[first_row : first_row + length]
        return found

    with _shard_writer(job, begun, groups, pulse, trace) as writer:

        def sink(piece: LocalSlice) -> None:
            _write(job, writer, table, piece)

        def counted(microbatch: Microbatch) -> None:
            done(sum(len(table.states_of(s.first_row, s.length)) for s in microbatch.segments))

        with pulse.running():
            capture = _capture(job, begun, _choice(begun.manifest, table.kept_rows, weights))
            stream = _microbatches(job, begun, table)
            model.capture(stream, tokens, capture=capture, sink=sink, done=counted, trace=trace)


def _run_gathering(
    job: Job,
    begun: Begun,
    model: "Qwen2HiddenModel",
    groups: "ProcessGroups",
    done: Done,
    pulse: Pulse,
    trace: Trace,
) -> None:
    """Rank 0 alone touches the store: it hands out the tokens of some microbatches, and gets their states back."""
    import torch

    from nemo_qwen_hidden.capture.gather import SliceBuffer, gather_slices, holdings
    from nemo_qwen_hidden.parallel.agree import broadcast_value

    widths = {point: prod(job.state_shape(point)) for point in _points(job, begun)}
    if job.norms_only:  # norms are taken from the states that arrive
        widths = dict.fromkeys(widths, job.architecture.shape.hidden_size)
    with ExitStack() as stack:
        first = groups.place.rank == 0
        writer = stack.enter_context(_shard_writer(job, begun, groups, pulse, trace)) if first else None
        table = _token_table(job, begun) if writer is not None else None
        stack.enter_context(pulse.running())
        rounds = _rounds(job, begun, table) if table is not None else iter(())
        while (work := broadcast_value(next(rounds, None), groups)) is not None:
            buffer = SliceBuffer()

            def tokens(first_row: int, length: int, work: Round = work) -> "torch.Tensor":
                return torch.from_numpy(work.token_ids[first_row].astype("int64"))

            def counted(microbatch: Microbatch, work: Round = work) -> None:
                done(sum(work.states(segment) for segment in microbatch.segments))

            capture = _capture(job, begun, _choice(begun.manifest, work.kept_rows, work.weights))
            model.capture(work.microbatches, tokens, capture=capture, sink=buffer, done=counted, trace=trace)
            expected = holdings(work.microbatches, capture, job.stages, job.topology)
            slices = gather_slices(
                buffer,
                expected,
                groups,
                widths=widths,
                dtype=capture.dtype(model.config.params_dtype),
                divisors=begun.manifest.pooling not in MEANS,
            )
            with trace.span("gather"):
                for piece in slices:
                    assert writer is not None and table is not None
                    _write(job, writer, table, piece)


def _write(job: Job, writer: "ShardWriter", table: TokenTable, piece: "LocalSlice") -> None:
    """Writes the states of a slice, which is in the CPU's memory, to their places."""
    runs = []
    for run in piece.runs:
        states = table.states_of(run.first_row, run.length)
        assert len(states) == run.kept
        runs.append(replace(run, first_row=states.start, length=len(states), picked=None))
    values = piece.values.float().norm(dim=1, keepdim=True) if job.norms_only else piece.values
    writer.write(piece.hook_point, runs, values, None if job.norms_only else piece.divisor)


def _capture(job: Job, begun: Begun, choice: "Choice | None") -> "Capture":
    from nemo_qwen_hidden.capture.attention import AttentionWeights
    from nemo_qwen_hidden.capture.taps import Capture

    heads = AttentionWeights(heads=job.heads, num_heads=job.architecture.shape.num_heads, keys=job.batching.max_tokens)
    return Capture(points=_points(job, begun), choice=choice, attention=heads)


def _choice(manifest: Manifest, kept_rows: KeptRows, weights: Weights) -> "Choice | None":
    """Which rows are kept, for the taps."""
    import torch

    from nemo_qwen_hidden.capture.rows import Choice

    if all(part.kept is None for part in manifest.parts):
        return None

    def kept(first_row: int, length: int) -> list[int] | None:
        rows = kept_rows(first_row, length)
        offsets: list[int] = (rows - first_row).tolist()
        return None if len(rows) == length else offsets

    def weight(first_row: int, length: int) -> "torch.Tensor | None":
        found = np.array(weights(first_row, length))
        return torch.from_numpy(found) if found.any() else None

    return Choice(weights=weight) if manifest.pooling in MEANS else Choice(kept=kept)


def _seal(job: Job, begun: Begun, groups: "ProcessGroups", trace: Trace) -> None:
    """Divides the shards that no rank has filled and sealed alone among the ranks that see the store."""
    import torch

    from nemo_qwen_hidden.parallel.agree import on_rank_0, wait_for_all

    path, manifest, rank = job.store_path, begun.manifest, groups.place.rank
    record, shards = on_rank_0(lambda: session.to_seal(path, manifest), groups, status_of=status_of)
    sealing = 1 if job.settings.capture.gather == "rank0" else groups.topology.world
    mine = shards[rank::sealing] if rank < sealing else []
    if mine:
        with trace.span("sealing", shards=len(mine)):
            threads = torch.get_num_threads()
            session.seal_shards(path, manifest, mine, record.errors, rank=rank, threads=threads, trace=trace)
    with trace.span("wait for all"):
        wait_for_all(groups)


def _points(job: Job, begun: Begun) -> tuple[HookPoint, ...]:
    """The hook points of this job that lack states."""
    lacking = {point for point, states in begun.done.items() if len(states) < begun.manifest.states}
    return tuple(point for point in job.points if point in lacking)


def _microbatches(job: Job, begun: Begun, table: TokenTable) -> Iterator[Microbatch]:
    """The microbatches of the whole store that hold a state that is missing: cut as they are where none is done."""
    missing, first_index = begun.missing, 0
    for number, part in enumerate(begun.manifest.parts):
        lengths = _lengths(table.part(number))
        for microbatch in plan(lengths, job.batching, first_row=part.first_row, first_index=first_index):
            first_index = microbatch.index + 1
            states = (table.states_of(segment.first_row, segment.length) for segment in microbatch.segments)
            if any(missing.meets(each.start, len(each)) for each in states):
                yield microbatch


@dataclass(frozen=True, kw_only=True)
class Round:
    """What rank 0 hands out of the store where no other rank sees it: microbatches, and by the first row of each of
    their segments the token ids, which rows are kept (ascending; all where it is ``full``), and what each weighs in a
    mean."""

    microbatches: tuple[Microbatch, ...]
    full: bool
    token_ids: Mapping[int, NDArray[np.int32]]
    kept: NDArray[np.int64]
    weight: Mapping[int, NDArray[np.float32]]

    def kept_rows(self, first_row: int, length: int) -> NDArray[np.int64]:
        start, stop = np.searchsorted(self.kept, (first_row, first_row + length))
        return self.kept[start:stop]

    def weights(self, first_row: int, length: int) -> NDArray[np.float32]:
        return self.weight[first_row]

    def states(self, segment: Segment) -> int:
        """How many rows of a segment have states."""
        return segment.length if self.full else len(self.kept_rows(segment.first_row, segment.length))


def _rounds(job: Job, begun: Begun, table: TokenTable) -> Iterator[Round]:
    """Some microbatches at a time."""
    stream = _microbatches(job, begun, table)
    means = begun.manifest.pooling in MEANS
    while microbatches := tuple(islice(stream, _round_size(job))):
        segments = [segment for microbatch in microbatches for segment in microbatch.segments]
        kept = [table.kept_rows(s.first_row, s.length) for s in segments if not table.full]
        yield Round(
            microbatches=microbatches,
            full=table.full,
            token_ids={s.first_row: table.token_id[s.first_row : s.first_row + s.length] for s in segments},
            kept=np.sort(np.concatenate([np.empty(0, np.int64), *kept])),
            weight={s.first_row: table.weight[s.first_row : s.first_row + s.length] for s in segments if means},
        )


def _round_size(job: Job) -> int:
    """Microbatches that are run before their states are gathered: as many as fit ``GATHERED_BYTES``, at most 16."""
    values = job.batching.batch_tokens * sum(prod(job.state_shape(point)) for point in job.points)
    fitting = GATHERED_BYTES // (values * BYTES[job.settings.precision.compute])
    return max(1, min(MOST_GATHERED_MICROBATCHES, fitting))


def _token_table(job: Job, begun: Begun) -> TokenTable:
    if not job.store_path.is_dir():
        rule = "must be a folder that all ranks share (where they share none: capture.gather=rank0)"
        raise StoreError("store.path", rule, str(job.store_path))
    return TokenTable(job.store_path, begun.manifest.parts)


def _lengths(tokens: PartTokens) -> Iterator[int]:
    """Tokens of every document of a part, in order, read some at a time."""
    for start in range(0, tokens.documents, LENGTHS_AT_ONCE):
        yield from tokens.lengths(start, min(start + LENGTHS_AT_ONCE, tokens.documents)).tolist()
