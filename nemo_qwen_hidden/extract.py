"""The main job: wires data, model, capture and store.

Three steps, so that whoever starts the ranks can stand between them: ``begin`` (one process: the folder and its token
table), ``run`` (every rank: hidden states into the store), ``finish`` (one process: coverage, then the manifest).
"""

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_qwen_hidden.config import BYTES
from nemo_qwen_hidden.data.fingerprint import DataFingerprint
from nemo_qwen_hidden.data.sources import read_documents
from nemo_qwen_hidden.data.tokenize import require_tokens, tokenize
from nemo_qwen_hidden.data.tokenizer import Tokenizer, load_tokenizer
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.parallel.heap import HeapTrimmer
from nemo_qwen_hidden.parallel.launch import local_world
from nemo_qwen_hidden.plan.footprint import store_bytes
from nemo_qwen_hidden.plan.microbatches import Microbatch, plan
from nemo_qwen_hidden.progress import Phase, Progress, Report, silent
from nemo_qwen_hidden.provenance import Begun, manifest_of
from nemo_qwen_hidden.store import session
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.token_writer import TokenTableWriter
from nemo_qwen_hidden.store.tokens import TokenTable

if TYPE_CHECKING:
    import torch

    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import ProcessGroups
    from nemo_qwen_hidden.store.writer import ShardWriter

LENGTHS_AT_ONCE = 65536
MOST_GATHERED_MICROBATCHES = 16
GATHERED_BYTES = 256 * 2**20
Written = dict[tuple[HookPoint, int], int]


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """written: rows of each hook point and shard that this rank wrote. seconds: of computing and writing, without
    start-up. peak_bytes: the most memory that the process held, files that it mapped included."""

    written: Written
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished job. seconds: from the first word of ``begin`` on; run_seconds: computing and writing alone."""

    manifest: Manifest
    path: Path
    topology: str
    seconds: float
    run_seconds: float
    peak_bytes: int


def begin(job: Job, report: Report = silent) -> Begun:
    """Writes the token table and makes the folder. One process, before any rank runs.

    The data are read to their end before the folder is made, or an earlier store there is deleted.

    Raises:
        DataError: documents that cannot be used. StoreError: the folder or the disk. Nothing is left behind.
    """
    started, path, settings = time.time(), job.store_path, job.settings
    report(Phase("tokenizing"))
    used: list[Tokenizer] = []

    def tokenizer() -> Tokenizer:
        used.append(load_tokenizer(job.model_folder))
        return used[0]

    fingerprint, windowed = DataFingerprint(), 0
    documents = read_documents(job.data_path, text_field=settings.data.text_field, id_field=settings.data.id_field)
    with session.staging(path) as staged:
        with TokenTableWriter(staged) as table:
            for document in tokenize(documents, tokenizer, vocab_size=job.architecture.shape.vocab_size):
                table.append(document_id=document.id, source=document.source, token_ids=document.token_ids)
                fingerprint.update(document)
                windowed += len(document.token_ids) > job.batching.max_tokens
            part = table.close()
        require_tokens(part.rows, job.data_path)
        session.check_space(path, disk_bytes(job, part.rows))
        description = {"hook_points": [str(point) for point in job.points]}
        session.begin(path, description, overwrite=settings.store.overwrite, staged=staged)
    return Begun(
        tokens=part,
        windowed=windowed,
        data_fingerprint=fingerprint.hexdigest(),
        tokenizer_fingerprint=used[0].fingerprint if used else None,
        started=started,
    )


def disk_bytes(job: Job, rows: int) -> int:
    """Bytes of a store of this many rows."""
    return store_bytes(
        rows=rows,
        hidden_size=job.architecture.shape.hidden_size,
        hook_points=len(job.points),
        itemsize=BYTES[job.settings.stored_dtype],
    )


def run(job: Job, begun: Begun, groups: "ProcessGroups", report: Report = silent) -> RankResult:
    """One rank's part: builds its stage, runs its microbatches, writes the rows that it holds. Collective over all
    ranks."""
    import torch

    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.agree import wait_for_all

    torch.set_num_threads(job.settings.runtime.threads or _fair_threads(job.topology.world))
    place = groups.place
    speaks = place.tp == 0 and place.pp == 0
    if speaks:
        report(Phase("loading weights"))
    model = Qwen2HiddenModel.from_pretrained(
        job.model_folder,
        groups=groups,
        dtype=job.settings.precision.compute,
        num_layers=job.num_layers,
        final_norm=job.final_norm,
    )
    if speaks:
        report(Phase("running"))
    wait_for_all(groups)  # so that the time of running counts nobody's start-up
    start, rows, heap = time.perf_counter(), 0, HeapTrimmer()

    def done(microbatch: Microbatch) -> None:
        nonlocal rows
        rows += microbatch.rows
        heap.trim()
        if speaks:
            report(Progress(place.dp, rows))

    gathers = job.settings.capture.gather == "rank0"
    written = (_run_gathering if gathers else _run_writing)(job, begun, model, groups, done)
    return RankResult(
        written=written,
        seconds=time.perf_counter() - start,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def finish(job: Job, begun: Begun, results: Sequence[RankResult]) -> Summary:
    """Checks that every row was written once and makes the folder a store. One process, after every rank has returned.

    Raises:
        CoverageError: rows are missing or were written twice.
    """
    written: Written = {}
    for result in results:
        for key, rows in result.written.items():
            written[key] = written.get(key, 0) + rows
    run_seconds = max(result.seconds for result in results)
    manifest = session.finish(job.store_path, manifest_of(job, begun, run_seconds), written=written)
    return Summary(
        manifest=manifest,
        path=job.store_path,
        topology=str(job.topology),
        seconds=time.time() - begun.started,
        run_seconds=run_seconds,
        peak_bytes=max(result.peak_bytes for result in results),
    )


def discard(job: Job) -> None:
    """Takes away what an unsuccessful job has begun."""
    session.discard(job.store_path)


def _shard_writer(job: Job, begun: Begun) -> "ShardWriter":
    from nemo_qwen_hidden.store.writer import ShardWriter

    return ShardWriter(
        job.store_path,
        hook_points=job.points,
        rows=begun.tokens.rows,
        hidden_size=job.architecture.shape.hidden_size,
        dtype=job.settings.stored_dtype,
        shard_rows=job.settings.store.shard_rows,
    )


def _run_writing(
    job: Job, begun: Begun, model: "Qwen2HiddenModel", groups: "ProcessGroups", done: Callable[[Microbatch], None]
) -> Written:
    """Every rank writes what it holds; nothing is sent for it."""
    import torch

    from nemo_qwen_hidden.capture.taps import LocalSlice

    table = _token_table(job, begun)

    def tokens(first_row: int, length: int) -> "torch.Tensor":
        return torch.from_numpy(table.token_id[first_row : first_row + length].astype("int64"))

    with _shard_writer(job, begun) as writer:

        def sink(piece: LocalSlice) -> None:
            writer.write(piece.hook_point, piece.runs, piece.values.cpu())

        model.capture(plan(_lengths(table), job.batching), tokens, points=job.points, sink=sink, done=done)
    return writer.written


def _run_gathering(
    job: Job, begun: Begun, model: "Qwen2HiddenModel", groups: "ProcessGroups", done: Callable[[Microbatch], None]
) -> Written:
    """Rank 0 alone touches the store: it hands out the tokens of some microbatches, and gets their states back."""
    import torch

    from nemo_qwen_hidden.capture.gather import SliceBuffer, gather_slices, holdings
    from nemo_qwen_hidden.parallel.agree import broadcast_value

    writer = _shard_writer(job, begun) if groups.place.rank == 0 else None
    rounds = _rounds(job, begun) if writer is not None else iter(())
    while (work := broadcast_value(next(rounds, None), groups)) is not None:
        microbatches, token_ids = work
        buffer = SliceBuffer()

        def tokens(first_row: int, length: int, token_ids: Mapping[int, Any] = token_ids) -> "torch.Tensor":
            return torch.from_numpy(token_ids[first_row].astype("int64"))

        model.capture(microbatches, tokens, points=job.points, sink=buffer, done=done)
        expected = holdings(microbatches, job.points, job.stages, job.topology)
        for piece in gather_slices(
            buffer, expected, groups, hidden_size=model.config.hidden_size, dtype=model.config.params_dtype
        ):
            assert writer is not None
            writer.write(piece.hook_point, piece.runs, piece.values)
    if writer is None:
        return {}
    writer.close()
    return writer.written


def _rounds(job: Job, begun: Begun) -> Iterator[tuple[tuple[Microbatch, ...], dict[int, Any]]]:
    """Some microbatches at a time, and the token ids of each of their segments by first row."""
    table = _token_table(job, begun)
    stream = plan(_lengths(table), job.batching)
    while microbatches := tuple(islice(stream, _round_size(job))):
        segments = (segment for microbatch in microbatches for segment in microbatch.segments)
        yield microbatches, {s.first_row: table.token_id[s.first_row : s.first_row + s.length] for s in segments}


def _round_size(job: Job) -> int:
    """Microbatches that are run before their states are gathered: as many as fit ``GATHERED_BYTES``, at most 16."""
    values = job.batching.batch_tokens * job.architecture.shape.hidden_size * len(job.points)
    fitting = GATHERED_BYTES // (values * BYTES[job.settings.precision.compute])
    return max(1, min(MOST_GATHERED_MICROBATCHES, fitting))


def _token_table(job: Job, begun: Begun) -> TokenTable:
    if not job.store_path.is_dir():
        rule = "must be a folder that all ranks share (where they share none: capture.gather=rank0)"
        raise StoreError("store.path", rule, str(job.store_path))
    return TokenTable(job.store_path, begun.tokens)


def _lengths(table: TokenTable) -> Iterator[int]:
    """Tokens of every document, in order, read a part at a time."""
    for start in range(0, table.documents, LENGTHS_AT_ONCE):
        yield from table.lengths(start, min(start + LENGTHS_AT_ONCE, table.documents)).tolist()


def _fair_threads(world: int) -> int:
    """This machine's usable cores, shared equally among the ranks on it."""
    return max(1, len(os.sched_getaffinity(0)) // local_world(world))
