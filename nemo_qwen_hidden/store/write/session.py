"""The life of a store that is being made, or added to. One process at a time, which has ``place.locked`` its folder.

``place.check_target`` before anything is loaded; ``find`` what is there; ``start`` a new job or ``resume`` the one
that a crash has ended; then every rank writes through a ``ShardWriter`` and closes it; then shards are sealed (see
``seal``) and ``finish`` makes the manifest. ``discard`` takes away a store of which nothing is durable yet.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from nemo_qwen_hidden.errors import CoverageError, StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet, union
from nemo_qwen_hidden.store.entries import ShardEntry
from nemo_qwen_hidden.store.fields import Fields, load_json, to_json
from nemo_qwen_hidden.store.files import naming_store, read_inside, sync_folder, write_durably
from nemo_qwen_hidden.store.folder import MARKER_FORMAT, remove, remove_if_empty, survey
from nemo_qwen_hidden.store.format import (
    JOB_LOCK,
    JOURNAL,
    MANIFEST,
    MARKER,
    PARTIAL,
    RANKS_LOCK,
    STAGED,
    TOKENS,
    VERSIONS_READ,
    Shard,
    shard_name,
)
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import header_of
from nemo_qwen_hidden.store.statistics import StoredError
from nemo_qwen_hidden.store.write import journal
from nemo_qwen_hidden.store.write.journal import JournalWriter, Record
from nemo_qwen_hidden.store.write.locks import rank_lock, wait_for_ranks
from nemo_qwen_hidden.store.write.place import check_space, naming_path
from nemo_qwen_hidden.store.write.seal import measure, publish
from nemo_qwen_hidden.trace.record import UNTRACED, Trace

_LOCK = ".lock"
_NAMED_AT_ONCE = 16  # shards that are sealed together, so that names and journal are made durable once for all of them


@dataclass(frozen=True, kw_only=True)
class Found:
    """What lies at a path. finished: what its manifest claims. unfinished: what a job that has not ended was making of
    it, or what it began with where the store grows by captured steps. begun: when and by whom, in words."""

    finished: Manifest | None
    unfinished: Manifest | None
    begun: str = ""
    grows: bool = False


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A temporary folder in the store, for a token table that is written before ``start``; called while ``locked``."""
    folder = path / JOURNAL / STAGED
    with naming_path(path):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def find(path: Path) -> Found:
    """What is there; called while ``locked``.

    Raises:
        StoreError: a manifest or marker is not what it should be.
    """
    contents = survey(path)
    manifest, marker, grows = None, None, False
    if contents.finished:
        manifest = Manifest.from_json(read_inside(path, MANIFEST), str(path / MANIFEST))
    if contents.marker is not None:
        marker, grows = _read_marker(path)
    return Found(finished=manifest, unfinished=marker, begun=contents.begun, grows=grows)


def start(
    path: Path, target: Manifest, files: Mapping[str, bytes], *, fresh: bool = True, staged: Path | None = None
) -> None:
    """Begins a job that makes the store at ``path`` into ``target``; called while ``locked``.

    Of what is there, only the files that ``target`` lists stay, and none of them where it is ``fresh``.

    Args:
        files: small files to write, by name. staged: a folder of ``staging`` whose token table becomes the store's.

    Raises:
        StoreError: no space is left, or the folder cannot be written.
    """
    check_space(path, sum(header_of(shard, target)[1].size_bytes for shard in target.missing()), replaced=fresh)
    with naming_path(path):
        # journal before marker: what an earlier job has claimed is not to be believed of this one's target
        remove(file for file in survey(path).files if file.parent.name == JOURNAL and file.suffix != _LOCK)
        sync_folder(path / JOURNAL)
        # marker before deletion: at every moment the folder is a whole store or says that it is unfinished
        _write_marker(path, target)
        wait_for_ranks(path)  # those that came before the marker: later ones see that it is not theirs
        sync_folder(path.absolute().parent)
        if fresh:
            remove([path / MANIFEST])
            sync_folder(path)
        else:
            _drop_false_manifest(path, target)
        _clear(path, kept=set() if fresh else {MANIFEST, *(file.file for file in target.files())})
        _put_files(path, target, files, staged)


def resume(path: Path, target: Manifest, files: Mapping[str, bytes], *, staged: Path | None = None) -> None:
    """Takes up the job that was to make ``target``; called while ``locked``. Only ``producers`` may differ from
    what ``find`` has found.

    Tidies what a crash leaves: what belongs to an earlier store goes; shards that got their final name but not their
    line in the journal become partial again; lines about shards that have gone are forgotten; the journal becomes one
    file.

    Args:
        files, staged: as for ``start``; used where the store lacks them.
    """
    with naming_path(path):
        _write_marker(path, target)
        wait_for_ranks(path)
        _drop_false_manifest(path, target)
        _clear(path, kept=_names(target) | {str(file.relative_to(path)) for file in (path / JOURNAL).iterdir()})
        _put_files(path, target, files, staged)
        record = journal.read(path)
        gone: dict[Shard, range] = {}
        for shard in target.missing():
            rows = target.grid.states_of(shard[1])
            claimed = shard in record.sealed or record.rows.get(shard[0], RowSet()).meets(rows.start, len(rows))
            if not _settle(path, target, shard, claimed=claimed, sealed=shard in record.sealed) and claimed:
                gone[shard] = rows
        journal.replace(path, record.without(gone))


def progress(path: Path, target: Manifest) -> tuple[Record, dict[HookPoint, RowSet]]:
    """The journal, and the states of each hook point that need not be run any more."""
    record = journal.read(path)
    done: dict[HookPoint, RowSet] = {}
    for entry in target.hook_points:
        kept = RowSet((shard.first_row, shard.rows) for shard in entry.present)
        sealed = RowSet((s.first_row, s.rows) for (point, _), s in record.sealed.items() if point == entry.point)
        done[entry.point] = union([kept, sealed, record.rows.get(entry.point, RowSet())])
    return record, done


def to_seal(path: Path, target: Manifest) -> tuple[Record, list[Shard]]:
    """The journal, and the shards that are to be sealed; called after every rank has closed its writer.

    Raises:
        CoverageError: states are missing or were written twice.
    """
    with naming_store(path, JOURNAL):
        record, done = progress(path, target)
    twice = ", ".join(map(str, record.twice))
    if twice:
        raise CoverageError(f"not every state was written exactly once: some of {twice} were written twice")
    lacking = {point: rows.complement(0, target.states) for point, rows in done.items()}
    for point, rows in lacking.items():
        if len(rows):
            first, length = rows.ranges[0]
            rule = f"{len(rows)} of {point} were not written, the first {first} to {first + length - 1}"
            raise CoverageError(f"not every state was written exactly once: {rule}")
    return record, [shard for shard in target.missing() if shard not in record.sealed]


def seal_shards(
    path: Path,
    target: Manifest,
    shards: Sequence[Shard],
    errors: Mapping[Shard, StoredError],
    *,
    rank: int,
    threads: int = 1,
    trace: Trace = UNTRACED,
) -> None:
    """Finishes some shards, this rank's share of those that ``to_seal`` has named; ``threads`` of them at a time.

    Args:
        errors: what storing the rows of each shard cost. trace: is told of each shard.
    """

    def measured(shard: Shard) -> tuple[Shard, ShardEntry]:
        with trace.span("seal", hook_point=shard[0], shard=shard[1]):
            return shard, measure(path, target, shard, errors.get(shard), durable=True)

    with ExitStack() as stack:
        stack.enter_context(naming_store(path, JOURNAL))
        stack.enter_context(rank_lock(path, target.producers))
        written = stack.enter_context(closing(JournalWriter(path, rank)))
        pool = stack.enter_context(ThreadPoolExecutor(threads, "sealing"))
        stack.callback(pool.shutdown, cancel_futures=True)
        entries = pool.map(measured, shards)
        while some := dict(islice(entries, _NAMED_AT_ONCE)):
            publish(path, some)
            written.sealed(some)


def finish(path: Path, target: Manifest) -> Manifest:
    """Makes the folder a store, or the store a larger one; returns its manifest. Called while ``locked``.

    Raises:
        CoverageError: a shard is not sealed; nothing is claimed.
        StoreError: no space is left for the manifest.
    """
    with naming_store(path, JOURNAL):
        sealed = journal.read(path).sealed
    points = tuple(
        replace(
            entry,
            shards=tuple(shard or sealed.get((entry.point, number)) for number, shard in enumerate(entry.shards)),
        )
        for entry in target.hook_points
    )
    finished = replace(target, hook_points=points)
    missing = next(finished.missing(), None)
    if missing is not None:
        raise CoverageError(f"shard {missing[1]} of {missing[0]} is not there")
    publish_manifest(path, finished)
    end(path)
    return finished


def publish_manifest(path: Path, manifest: Manifest) -> None:
    """Makes the folder the store that ``manifest`` says, of which everything is durable. Called while ``locked``."""
    text = manifest.to_json()
    Manifest.from_json(text, str(path / MANIFEST))  # what could not be read back is not written
    sync_folder(path)
    write_durably(path / MANIFEST, text)


def end(path: Path) -> None:
    """The manifest says all that the job has made. Called while ``locked``."""
    remove([path / MARKER])
    sync_folder(path)


def grow(path: Path, whole: Manifest, kept: Manifest) -> None:
    """Begins a job that adds parts to the store at ``path``; called while ``locked``. Other files than ``kept`` lists
    are deleted, and the journal becomes empty.

    Args:
        whole: what is there, all of it durable, some of it known to the journal alone. kept: the first parts of it.

    Raises:
        StoreError: no space is left, or the folder cannot be written.
    """
    with naming_path(path):
        if whole.parts and _listed(path) != {file.file for file in whole.files()}:
            publish_manifest(path, whole)  # before the journal goes
        remove(file for file in survey(path).files if file.parent.name == JOURNAL and file.suffix != _LOCK)
        sync_folder(path / JOURNAL)
        _write_marker(path, kept, grows=True)  # before deletion, as in ``start``
        wait_for_ranks(path)
        sync_folder(path.absolute().parent)
        if kept.parts:
            publish_manifest(path, kept)
        else:
            remove([path / MANIFEST])
            sync_folder(path)
        _clear(path, kept={MANIFEST, *(file.file for file in kept.files())})


def discard(path: Path) -> bool:
    """Ends a job of which nothing is durable yet, and leaves what was there before it; says whether it did. Called
    while ``locked``.

    Raises:
        StoreError: the folder cannot be written any more.
    """
    if not (path / MARKER).exists():
        return False
    record = journal.read(path)
    if record.sealed or record.added or any(map(len, record.rows.values())):
        return False
    with naming_path(path):
        _clear(path, {MANIFEST, *_listed(path)} if (path / MANIFEST).exists() else set())
        remove([path / MARKER])
        sync_folder(path)
    return True


def _write_marker(path: Path, target: Manifest, *, grows: bool = False) -> None:
    marker = {
        "format": MARKER_FORMAT,
        "version": target.version,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"grows": True} if grows else {}),
        "target": target.as_dict(),
    }
    write_durably(path / MARKER, to_json(marker))


def _read_marker(path: Path) -> tuple[Manifest, bool]:
    """The target, and whether it grows."""
    name = str(path / MARKER)
    fields = Fields(load_json(read_inside(path, MARKER), name), file=name)
    version = fields.integer("version")
    if version not in VERSIONS_READ:
        known = " or ".join(str(number) for number in VERSIONS_READ)
        raise fields.error("version", f"must be {known}, which this release of nemo_qwen_hidden goes on with", version)
    if "merge" in fields:
        rule = "must be a store that a job goes on with; an unfinished merge is there, and the same merge does it again"
        raise StoreError("store.path", rule, str(path))
    grows = fields.boolean("grows") if "grows" in fields else False
    return Manifest.parse(fields.nested("target"), version), grows


def _settle(path: Path, target: Manifest, shard: Shard, *, claimed: bool, sealed: bool) -> bool:
    """Whether what the journal says of a shard can be true; gives it the name that it should have. A file of which the
    journal says nothing is a shard that was dropped: it goes, and is not written to, for another store may share it."""
    final = path / str(shard[0]) / shard_name(shard[1])
    partial = final.with_name(final.name + PARTIAL)
    size = header_of(shard, target)[1].size_bytes
    if sealed and final.is_file() and final.stat().st_size == size:
        return True
    if final.is_file():
        if claimed:
            os.rename(final, partial)
        else:
            final.unlink()
        sync_folder(final.parent)
    return not sealed and partial.is_file() and partial.stat().st_size == size


def _drop_false_manifest(path: Path, target: Manifest) -> None:
    """Deletes a manifest that claims shards which ``target`` says are missing: they are about to be rewritten."""
    claimed = _listed(path)
    if any(f"{point}/{shard_name(number)}" in claimed for point, number in target.missing()):
        remove([path / MANIFEST])
        sync_folder(path)


def _listed(path: Path) -> set[str]:
    """Files that the manifest claims; none where there is no manifest."""
    if not (path / MANIFEST).exists():
        return set()
    return {file.file for file in Manifest.from_json(read_inside(path, MANIFEST), str(path / MANIFEST)).files()}


def _put_files(path: Path, target: Manifest, files: Mapping[str, bytes], staged: Path | None) -> None:
    for name, contents in files.items():
        listed = {file.file: file.sha256 for file in target.files()}[name]
        digest = hashlib.sha256(contents).hexdigest()
        if digest != listed:
            raise StoreError("model.path", f"must give {name} the content that it had (sha256 {listed})", digest)
        if not (path / name).is_file() or (path / name).read_bytes() != contents:
            write_durably(path / name, contents)
    if staged is None:
        return
    (path / TOKENS).mkdir(exist_ok=True)
    for file in (file for part in target.parts for file in (part.tokens, part.lines)):
        ready, place = staged / file.file, path / file.file
        if ready.exists() and not (place.is_file() and _sha256(place) == file.sha256):
            digest = _sha256(ready)
            if digest != file.sha256:
                rule = (
                    f"must give {file.file} the content that it had (sha256 {file.sha256}); it is missing in the store"
                )
                raise StoreError("data.path", rule, f"sha256 {digest}")
            os.replace(ready, place)
    sync_folder(path / TOKENS)
    sync_folder(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(target: Manifest) -> set[str]:
    """Files that may lie in a folder that is to become ``target``, but for the journal's."""
    missing = [f"{point}/{shard_name(number)}" for point, number in target.missing()]
    return {MANIFEST, *(file.file for file in target.files()), *missing, *(name + PARTIAL for name in missing)}


def _clear(path: Path, kept: set[str]) -> None:
    """Deletes durably what is ours, but for the marker, locks, and ``kept``."""
    contents = survey(path)
    staying = {path / name for name in kept} | {path / MARKER}
    locks = (path / JOURNAL / JOB_LOCK, path / JOURNAL / RANKS_LOCK)
    remove(file for file in contents.files if file not in staying and file not in locks)
    for folder in contents.folders:
        remove_if_empty(folder)
        if folder.exists():
            sync_folder(folder)
