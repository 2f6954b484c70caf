"""Stores of disjoint documents, made alike by one model, as one store.

Shards and token tables count rows and states in their own part, so that none of their bytes change: files are linked
under new numbers, and only the manifest is new.
"""

import errno
import hashlib
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.errors import StoreError, raise_all
from nemo_qwen_hidden.store.entries import FileEntry, HookPointEntry, Part, ShardEntry
from nemo_qwen_hidden.store.fields import to_json
from nemo_qwen_hidden.store.files import naming_full_disk, open_inside, sync_folder, write_durably
from nemo_qwen_hidden.store.folder import MARKER_FORMAT, remove, survey
from nemo_qwen_hidden.store.format import JOURNAL, MANIFEST, MARKER, shard_name
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.document_ids import shared_documents
from nemo_qwen_hidden.store.table import lines_name, table_name
from nemo_qwen_hidden.store.upkeep.checked import BLOCK_BYTES, BytesReport, Meter, no_report
from nemo_qwen_hidden.store.upkeep.merge_checks import differences, shared_data
from nemo_qwen_hidden.store.upkeep.verify import read_manifest, verify
from nemo_qwen_hidden.store.write import place, session

WORK = "merged"
INTO = "--into"
_MERGE = "merge"  # field of the marker, in place of the target that an extract job could go on with
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
Copies = dict[str, tuple[Path, FileEntry | ShardEntry]]
"""Where each file of the new store comes from: the store, and what that lists it as."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """linked, copied: numbers of files; both 0 where the store was there already."""

    path: Path
    manifest: Manifest
    linked: int
    copied: int


def merge(
    stores: Sequence[str | os.PathLike[str]],
    into: str | os.PathLike[str],
    *,
    copy: bool = False,
    producer: Mapping[str, Any] | None = None,
    report: BytesReport = no_report,
) -> Merged:
    """Makes one store of several, whose documents follow each other in the order of ``stores``.

    Files are linked where the file system can do it, so that both stores share their bytes; else copied. A merge that
    was ended is started over by the same call; nothing at ``into`` looks like a store before all of it is there. A
    quick verification of each store comes first.

    Args:
        copy: never link. producer: what the new manifest says of this merge beside ``work`` and ``stores``.
        report: called with the bytes that are linked or copied, and all there are.

    Raises:
        StoreNotFoundError: there is no finished store. StoreError: one is damaged, or has an unfinished job; something
        else is at ``into``; or no space is left. UserError: stores differ in what all must share, or share documents;
        names each difference.
    """
    folders, target_folder = [Path(store) for store in stores], Path(into)
    manifests = [_read(folder) for folder in folders]
    named = dict(zip(map(str, folders), manifests, strict=True))
    if len(named) < max(2, len(folders)):
        raise StoreError("STORE", "must be two stores or more, each once", [str(folder) for folder in folders])
    for folder in folders:
        if target_folder.resolve().is_relative_to(folder.resolve()):
            raise StoreError(INTO, f"must lie outside of {folder}", str(target_folder))
    raise_all([*differences(named), *shared_data(named)])
    raise_all(list(shared_documents(folders, manifests)))
    target, copies = _merged(folders, manifests, {"work": WORK, "stores": list(named), **(producer or {})})
    with place.locked(target_folder):
        if _is_there(target_folder, target):
            return Merged(path=target_folder, manifest=read_manifest(target_folder), linked=0, copied=0)
        if copy:
            place.check_space(target_folder, sum(entry.bytes for _, entry in copies.values()), replaced=True)
        _begin(target_folder, named)
        linked = _put(target_folder, copies, copy=copy, report=report)
        session.finish(target_folder, target)
    return Merged(path=target_folder, manifest=target, linked=linked, copied=len(copies) - linked)


def _read(folder: Path) -> Manifest:
    """The manifest of a store that a quick verification finds whole."""
    report = verify(folder)
    if report.unfinished is not None:
        raise StoreError("STORE", f"must have no unfinished job ({report.unfinished})", str(folder))
    if report.findings:
        first = report.findings[0]
        rule = f"must be whole, which `verify` says it is not ({len(report.findings)} findings; {first.file}: "
        raise StoreError("STORE", f"{rule}{first.what})", str(folder))
    return read_manifest(folder)


def _merged(
    folders: Sequence[Path], manifests: Sequence[Manifest], producer: Mapping[str, Any]
) -> tuple[Manifest, Copies]:
    """The manifest of all stores as one, and where its files come from."""
    copies: Copies = {}
    first = manifests[0]
    norms = ((folder, manifest.final_norm) for folder, manifest in zip(folders, manifests, strict=True))
    norm_folder, norm = next((found for found in norms if found[1] is not None), (folders[0], None))
    if norm is not None:
        copies[norm.file] = norm_folder, norm
    tokenizer = next(
        (known for known in (each.tokenizer for each in manifests) if known.get("sha256")), first.tokenizer
    )
    rows = [0, *accumulate(manifest.rows for manifest in manifests)]
    states = [0, *accumulate(manifest.states for manifest in manifests)]
    documents = [0, *accumulate(manifest.documents for manifest in manifests)]
    parts: list[Part] = []
    for folder, manifest, row, document in zip(folders, manifests, rows, documents, strict=False):
        for part in manifest.parts:
            tokens = _moved(copies, folder, part.tokens, table_name(len(parts)))
            lines = _moved(copies, folder, part.lines, lines_name(len(parts)))
            parts.append(
                replace(
                    part,
                    first_row=part.first_row + row,
                    first_document=part.first_document + document,
                    tokens=tokens,
                    lines=lines,
                )
            )
    points: list[HookPointEntry] = []
    for number, entry in enumerate(first.hook_points):
        shards: list[ShardEntry] = []
        for folder, manifest, state in zip(folders, manifests, states, strict=False):
            for shard in manifest.hook_points[number].present:
                name = f"{entry.point}/{shard_name(len(shards))}"
                copies[name] = folder, shard
                shards.append(replace(shard, file=name, first_row=shard.first_row + state))
        points.append(replace(entry, shards=tuple(shards)))
    producers = (*(each for manifest in manifests for each in manifest.producers), producer)
    first = replace(first, final_norm=norm, tokenizer=tokenizer)
    return replace(first, parts=tuple(parts), hook_points=tuple(points), producers=producers), copies


def _moved(copies: Copies, folder: Path, entry: FileEntry, name: str) -> FileEntry:
    copies[name] = folder, entry
    return replace(entry, file=name)


def _is_there(folder: Path, target: Manifest) -> bool:
    """Whether the store at ``folder`` is ``target`` already.

    Raises:
        StoreError: something else is there.
    """
    contents = survey(folder)
    if contents.marker is not None and _MERGE in contents.marker:
        return False
    if contents.marker is None and not contents.finished:
        return False
    if contents.marker is None and replace(read_manifest(folder), producers=()) == replace(target, producers=()):
        return True
    rule = "must be a new or empty folder, or one in which this merge was ended; another store is there"
    raise StoreError(INTO, rule, str(folder))


def _begin(folder: Path, named: Iterable[str]) -> None:
    """Says that the store is being made, and takes away what an earlier merge has left."""
    marker = {
        "format": MARKER_FORMAT,
        "version": 1,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        _MERGE: list(named),
    }
    write_durably(folder / MARKER, to_json(marker))
    sync_folder(folder.absolute().parent)
    remove([folder / MANIFEST])
    sync_folder(folder)
    remove(file for file in survey(folder).files if file.name != MARKER and file.parent.name != JOURNAL)


def _put(folder: Path, copies: Copies, *, copy: bool, report: BytesReport) -> int:
    """Links or copies all files, durably; how many were linked."""
    meter = Meter(report, sum(entry.bytes for _, entry in copies.values()))
    put = _copy if copy else _link
    linked, parents = 0, {folder}
    for name, (source, entry) in copies.items():
        parent = (folder / name).parent
        if parent not in parents:
            parent.mkdir(exist_ok=True)
            parents.add(parent)
        with naming_full_disk(folder, name):
            linked += put(source, entry, folder / name)
        found = (folder / name).lstat().st_size
        if found != entry.bytes:
            raise StoreError(str(source / entry.file), f"must stay {entry.bytes} bytes long while it is read", found)
        meter.add(entry.bytes)
    for parent in parents:
        sync_folder(parent)
    return linked


def _link(source: Path, entry: FileEntry | ShardEntry, place: Path) -> bool:
    """Whether ``place`` could be made another name of the file; else it is a copy."""
    try:
        os.link(source / entry.file, place, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return _copy(source, entry, place)
    return True


def _copy(source: Path, entry: FileEntry | ShardEntry, place: Path) -> bool:
    """Copies the file durably; never a link.

    Raises:
        StoreError: it is not what the manifest lists.
    """
    digest = hashlib.sha256()
    with os.fdopen(open_inside(source, entry.file), "rb") as whence, open(place, "wb") as whither:
        while block := whence.read(BLOCK_BYTES):
            digest.update(block)
            whither.write(block)
        whither.flush()
        os.fsync(whither.fileno())
    if digest.hexdigest() != entry.sha256:
        rule = f"must have the SHA-256 {entry.sha256}, as the manifest says"
        raise StoreError(str(source / entry.file), rule, digest.hexdigest())
    return False
