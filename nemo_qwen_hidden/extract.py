"""The main job: wires data, model, capture and store.

Three steps, so that whoever starts the ranks can stand between them: ``begin`` (one process: what there is to do),
``running.run`` (every rank: hidden states into the store), ``finish`` (one process: the manifest), all inside of
``locked``.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from nemo_qwen_hidden import target
from nemo_qwen_hidden.config import BYTES, MEANS, ProfileSettings
from nemo_qwen_hidden.errors import ConfigError, DataError
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS
from nemo_qwen_hidden.job import Job, Outline
from nemo_qwen_hidden.part import Norms, make_part
from nemo_qwen_hidden.plan.outliers import norm_point
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.progress import Phase, Report, silent
from nemo_qwen_hidden.provenance import model_of, norm_file_of, producer_of
from nemo_qwen_hidden.running import Begun, RankResult
from nemo_qwen_hidden.store.entries import Part
from nemo_qwen_hidden.store.format import DTYPES
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.document_ids import shared_documents
from nemo_qwen_hidden.store.shard import shard_bytes
from nemo_qwen_hidden.store.table import KEPT_BYTES, TOKEN_BYTES
from nemo_qwen_hidden.store.write import place, session


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished job. work: what it did, in words; None where there was nothing to do. states: that it made. seconds:
    from the first word of ``begin`` on; run_seconds: computing and writing alone."""

    manifest: Manifest
    path: Path
    topology: str
    work: str | None
    states: int
    seconds: float
    run_seconds: float
    peak_bytes: int


def locked(job: Job) -> AbstractContextManager[None]:
    """While entered, no other job works on the store; what nobody has used goes when it is left.

    Raises:
        StoreError: another job does, or the folder cannot be used.
    """
    return place.locked(job.store_path)


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
    known = place.exists(job.store_path) and not store.overwrite and store.add is None
    if tokens.max_norm is None or store.add == "hook_points" or known:
        return None
    point = norm_point(tokens, job.points, num_layers=job.architecture.shape.num_layers)
    path = _norms_path(job)
    chosen = replace(
        settings,
        tokens=replace(tokens, max_norm=None, max_norm_at=None),
        store=replace(store, path=str(path), overwrite=True, add=None),
        profile=ProfileSettings(),
        precision=replace(settings.precision, stored="fp32", nonfinite="keep"),
    )
    return replace(job, settings=chosen, points=(point,), norms_only=True)


def drop_norms(job: Job) -> None:
    """Takes the store of the ``norm_job`` of ``job`` away, once the rows are chosen or the job has failed, and one that
    a killed job has left. Called while ``job`` is ``locked``."""
    with suppress(FileNotFoundError):
        shutil.rmtree(_norms_path(job))


def _norms_path(job: Job) -> Path:
    return job.store_path.with_name(f".{job.store_path.name}.norms")


def _norms(job: Job | None) -> Norms | None:
    """The norms that a ``norm_job`` has made, in order of rows."""
    if job is None:
        return None
    from nemo_qwen_hidden.store.read.reader import open_store  # needs torch, which no other step here does

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


def disk_bytes(job: Outline, *, rows: int, states: int) -> int:
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
        states=len(begun.missing),
        seconds=time.time() - begun.started,
        run_seconds=run_seconds,
        peak_bytes=max((result.peak_bytes for result in results), default=0),
    )


def discard(job: Job) -> bool:
    """Takes away what an unsuccessful job has begun, unless there is something to go on with; says whether it did."""
    return session.discard(job.store_path)
