"""The main job: wires data, model, capture and store.

Three steps, so that whoever starts the ranks can stand between them: ``begin`` (one process: what there is to do),
``run`` (every rank: hidden states into the store), ``finish`` (one process: the manifest), all inside of ``locked``.
"""

import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden import target
from nemo_qwen_hidden.config import BYTES, MEANS
from nemo_qwen_hidden.errors import ConfigError, DataError, StoreError, status_of
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, HookPoint
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.parallel.heap import HeapTrimmer
from nemo_qwen_hidden.parallel.launch import fair_threads
from nemo_qwen_hidden.parallel.watch import Pulse
from nemo_qwen_hidden.part import Norms, make_part
from nemo_qwen_hidden.plan.microbatches import Microbatch, Segment, plan
from nemo_qwen_hidden.plan.outliers import norm_point
from nemo_qwen_hidden.plan.rowset import RowSet, union
from nemo_qwen_hidden.progress import Phase, Progress, Report, silent
from nemo_qwen_hidden.provenance import model_of, norm_file_of, producer_of
from nemo_qwen_hidden.store.entries import Part
from nemo_qwen_hidden.store.format import DTYPES
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.document_ids import shared_documents
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.read.tokens import PartTokens, TokenTable
from nemo_qwen_hidden.store.shard import shard_bytes
from nemo_qwen_hidden.store.table import KEPT_BYTES, TOKEN_BYTES
from nemo_qwen_hidden.store.write import session

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


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished job. work: what it did, in words; None where there was nothing to do. rows: that it ran. seconds: from
    the first word of ``begin`` on; run_seconds: computing and writing alone."""

    manifest: Manifest
    path: Path
    topology: str
    work: str | None
    rows: int
    seconds: float
    run_seconds: float
    peak_bytes: int


def locked(job: Job) -> AbstractContextManager[None]:
    """While entered, no other job works on the store; what nobody has used goes when it is left.

    Raises:
        StoreError: another job does, or the folder cannot be used.
    """
    return session.locked(job.store_path)


def begin(job: Job, report: Report = silent, *, norms: Job | None = None) -> Begun:
    """Finds out what there is to do, and makes the folder ready for it. One process, before any rank runs.

    The data are read to their end before anything in the folder changes. norms: the ``norm_job`` that has run before.

    Raises:
        DataError: documents that cannot be used. StoreError: the folder or the disk. UserError: the store there was
            made by another model, or with other settings or data. Nothing is left behind.
    """
    started, path = time.time(), job.store_path
    report(Phase("reading weights"))
    model, norm = model_of(job), norm_file_of(job)
    overwrite = job.settings.store.overwrite
    found = session.Found(finished=None, unfinished=None) if overwrite else session.find(path)
    target.check_settings(job, found, model)
    if job.settings.store.add == "hook_points" and found.finished is not None:
        report(Phase("taking the rows of the store; data.path is not read"))
        wanted = found.unfinished or target.with_hook_points(job, found.finished)
        return _begin(job, found, wanted, norm, target.HOOK_POINTS, started)
    report(Phase("tokenizing"))
    adds = job.settings.store.add == "documents"
    number = len(found.finished.parts) if found.finished is not None and adds else 0
    with session.staging(path) as staged:
        made = make_part(job, staged, number, _norms(norms))
        part, tokenizer = made.part, made.tokenizer
        _check_attention(job, part)
        known = target.check_data(job, found, part, tokenizer)
        if found.unfinished is not None:
            wanted = found.unfinished
        elif found.finished is not None:
            if known is None:
                _check_new(job, found.finished, part, staged)
            wanted = found.finished if known else target.with_documents(found.finished, part)
        else:
            wanted = target.new(job, part, model, tokenizer, norm)
        return _begin(job, found, wanted, norm, target.DOCUMENTS if adds else target.NEW, started, staged=staged)


def _check_new(job: Job, store: Manifest, part: Part, staged: Path) -> None:
    """Whether documents that are to be added are new to the store, by their ids: a pattern of files that has grown
    would give the old ones again."""
    folders, manifests = [job.store_path, staged], [store, replace(store, parts=(part,))]
    clash = next(shared_documents(folders, manifests), None)
    if clash is not None:
        rule = f"must give no document whose id the store at {job.store_path} holds already"
        raise DataError("data.path", rule, clash.value)


def norm_job(job: Job) -> Job | None:
    """The job that has to run first where rows are left out for their norm: it makes a small store of the norms of all
    rows that may be kept, beside the store. None where no norm is needed, or the store knows its rows already."""
    settings = job.settings
    tokens, store = settings.tokens, settings.store
    known = session.exists(job.store_path) and not store.overwrite and store.add is None
    if tokens.max_norm is None or store.add == "hook_points" or known:
        return None
    point = norm_point(tokens, job.points, num_layers=job.architecture.shape.num_layers)
    path = _norms_path(job)
    chosen = replace(
        settings,
        tokens=replace(tokens, max_norm=None, max_norm_at=None),
        store=replace(store, path=str(path), overwrite=True, add=None),
        precision=replace(settings.precision, stored="fp32", nonfinite="keep"),
    )
    return replace(job, settings=chosen, points=(point,), norms_only=True)


def drop_norms(job: Job) -> None:
    """Takes the store of the ``norm_job`` of ``job`` away, once the rows are chosen or the job has failed, and one that
    a killed job has left. Called while ``job`` is ``locked``."""
    shutil.rmtree(_norms_path(job), ignore_errors=True)


def _norms_path(job: Job) -> Path:
    return job.store_path.with_name(f".{job.store_path.name}.norms")


def _norms(job: Job | None) -> Norms | None:
    """The norms that a ``norm_job`` has made, in order of rows."""
    if job is None:
        return None
    view = open_store(job.store_path)[str(job.points[0])]
    return lambda first, count: np.asarray(view[first : first + count], np.float32)[:, 0]


def _check_attention(job: Job, part: Part) -> None:
    points = [point for point in job.points if point.site == ATTN_WEIGHTS]
    size = sum(prod(job.state_shape(point)) for point in points) * part.states * BYTES[job.settings.stored_dtype]
    if size > job.settings.capture.most_attention_gb * 1e9:
        rule = f"must be at least {size / 1e9:.3g} for these attn_weights (or ask for fewer heads, layers or tokens)"
        raise ConfigError("capture.most_attention_gb", rule, job.settings.capture.most_attention_gb)


def _begin(
    job: Job,
    found: session.Found,
    wanted: Manifest,
    norm: bytes,
    work: str,
    started: float,
    *,
    staged: Path | None = None,
) -> Begun:
    path = job.store_path
    if found.unfinished is None and next(wanted.missing(), None) is None:
        done = {point: RowSet([(0, wanted.states)]) for point in wanted.points}
        return Begun(manifest=wanted, work=None, done=done, started=started)
    work = target.RESUMED if found.unfinished is not None else work
    wanted = replace(wanted, producers=(*wanted.producers, producer_of(job, work, started)))
    files = {} if wanted.final_norm is None else {wanted.final_norm.file: norm}
    if found.unfinished is not None:
        session.resume(path, wanted, files, staged=staged)
    else:
        session.start(path, wanted, files, fresh=found.finished is None, staged=staged)
    _, done = session.progress(path, wanted)
    return Begun(manifest=wanted, work=work, done=done, started=started)


def disk_bytes(job: Job, *, rows: int, states: int) -> int:
    """Bytes of shards and token tables of a new store of so many rows, some of which have states."""
    whole, rest = divmod(states, job.settings.store.shard_rows)
    sizes = [(whole, job.settings.store.shard_rows), (1 if rest else 0, rest)]
    dtype, divisor = DTYPES[job.settings.stored_dtype], job.settings.tokens.pool not in MEANS
    shards = sum(
        count * shard_bytes(size, width=prod(job.state_shape(point)), dtype=dtype, divisor=divisor and point.normed)
        for point in job.points
        for count, size in sizes
    )
    return shards + TOKEN_BYTES * rows + (KEPT_BYTES * states if states < rows else 0)


def run(
    job: Job, begun: Begun, groups: "ProcessGroups", report: Report = silent, pulse: Pulse | None = None
) -> RankResult:
    """One rank's part: builds its stage, runs its microbatches, writes the rows that it holds, finishes its share of
    the shards. Collective over all ranks.

    Args:
        pulse: is told of everything that gets done, for whoever watches this rank.
    """
    import torch

    torch.set_num_threads(job.settings.runtime.threads or fair_threads(job.topology.world))
    place = groups.place
    speaks = place.tp == 0 and place.cp == 0 and place.pp == 0
    start = time.perf_counter()
    if len(begun.missing):
        start = _run_missing(job, begun, groups, report if speaks else silent, pulse or Pulse())
    if speaks:
        report(Phase("finishing shards"))
    _seal(job, begun, groups)
    return RankResult(
        seconds=time.perf_counter() - start,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _run_missing(job: Job, begun: Begun, groups: "ProcessGroups", report: Report, pulse: Pulse) -> float:
    """Runs what is missing, until it is durable; the time at which computing began, in seconds of ``perf_counter``."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.agree import wait_for_all

    report(Phase("loading weights"))
    model = Qwen2HiddenModel.from_pretrained(
        job.model_folder,
        groups=groups,
        dtype=job.settings.precision.compute,
        num_layers=job.num_layers,
        final_norm=job.final_norm,
        split=job.split,
    )
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
    (_run_gathering if gathers else _run_writing)(job, begun, model, groups, done, pulse)
    wait_for_all(groups)
    return start


def finish(job: Job, begun: Begun, results: Sequence[RankResult]) -> Summary:
    """Makes the folder a store. One process, after every rank has returned.

    Raises:
        CoverageError: a shard is not there.
    """
    run_seconds = max((result.seconds for result in results), default=0.0)
    manifest = begun.manifest
    if begun.work is not None:
        producer = {**manifest.producers[-1], "run_secs": round(run_seconds, 3)}
        manifest = session.finish(job.store_path, replace(manifest, producers=(*manifest.producers[:-1], producer)))
    return Summary(
        manifest=manifest,
        path=job.store_path,
        topology=str(job.topology),
        work=begun.work,
        rows=len(begun.missing),
        seconds=time.time() - begun.started,
        run_seconds=run_seconds,
        peak_bytes=max((result.peak_bytes for result in results), default=0),
    )


def discard(job: Job) -> bool:
    """Takes away what an unsuccessful job has begun, unless there is something to go on with; says whether it did."""
    return session.discard(job.store_path)


def _shard_writer(job: Job, begun: Begun, groups: "ProcessGroups", pulse: Pulse) -> "ShardWriter":
    from nemo_qwen_hidden.store.write.writer import ShardWriter

    return ShardWriter(
        job.store_path,
        begun.manifest,
        rank=groups.place.rank,
        done=begun.done,
        nonfinite=job.settings.precision.nonfinite,
        commit_secs=job.settings.store.commit_secs,
        progressed=pulse.progressed,
    )


def _run_writing(
    job: Job, begun: Begun, model: "Qwen2HiddenModel", groups: "ProcessGroups", done: Done, pulse: Pulse
) -> None:
    """Every rank writes what it holds; nothing is sent for it."""
    import torch

    from nemo_qwen_hidden.capture.gather import on_host
    from nemo_qwen_hidden.capture.taps import LocalSlice

    table = _token_table(job, begun)

    def tokens(first_row: int, length: int) -> "torch.Tensor":
        return torch.from_numpy(table.token_id[first_row : first_row + length].astype("int64"))

    def weights(first_row: int, length: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = table.weight[first_row : first_row + length]
        return found

    with _shard_writer(job, begun, groups, pulse) as writer:

        def sink(piece: LocalSlice) -> None:
            _write(job, writer, table, on_host(piece))

        def counted(microbatch: Microbatch) -> None:
            done(sum(len(table.states_of(s.first_row, s.length)) for s in microbatch.segments))

        with pulse.running():
            capture = _capture(job, begun, _choice(begun.manifest, table.kept_rows, weights))
            model.capture(_microbatches(job, begun, table), tokens, capture=capture, sink=sink, done=counted)


def _run_gathering(
    job: Job, begun: Begun, model: "Qwen2HiddenModel", groups: "ProcessGroups", done: Done, pulse: Pulse
) -> None:
    """Rank 0 alone touches the store: it hands out the tokens of some microbatches, and gets their states back."""
    import torch

    from nemo_qwen_hidden.capture.gather import SliceBuffer, gather_slices, holdings
    from nemo_qwen_hidden.parallel.agree import broadcast_value

    widths = {point: prod(job.state_shape(point)) for point in _points(job, begun)}
    if job.norms_only:  # norms are taken from the states that arrive
        widths = dict.fromkeys(widths, job.architecture.shape.hidden_size)
    with ExitStack() as stack:
        writer = stack.enter_context(_shard_writer(job, begun, groups, pulse)) if groups.place.rank == 0 else None
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
            model.capture(work.microbatches, tokens, capture=capture, sink=buffer, done=counted)
            expected = holdings(work.microbatches, capture, job.stages, job.topology)
            slices = gather_slices(
                buffer,
                expected,
                groups,
                widths=widths,
                dtype=capture.dtype(model.config.params_dtype),
                divisors=begun.manifest.pooling not in MEANS,
            )
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


def _seal(job: Job, begun: Begun, groups: "ProcessGroups") -> None:
    """Divides the shards that are whole among the ranks that see the store, each of which finishes its own."""
    import torch

    from nemo_qwen_hidden.parallel.agree import on_rank_0, wait_for_all

    path, manifest, rank = job.store_path, begun.manifest, groups.place.rank
    record, shards = on_rank_0(lambda: session.to_seal(path, manifest), groups, status_of=status_of)
    sealing = 1 if job.settings.capture.gather == "rank0" else groups.topology.world
    mine = shards[rank::sealing] if rank < sealing else []
    if mine:
        session.seal_shards(path, manifest, mine, record.errors, rank=rank, threads=torch.get_num_threads())
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
