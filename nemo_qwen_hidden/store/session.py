"""The life of a store that is being made. Each step is called by one rank, the others waiting where it says so.

``check_target`` before anything is loaded; ``begin``; the token table by ``TokenTableWriter``; ``check_space``; then
every rank writes through a ``ShardWriter`` and closes it; then ``finish``, or ``discard`` where something failed.
"""

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.errors import CoverageError, StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import HookPointEntry, ShardEntry
from nemo_qwen_hidden.store.fields import to_json
from nemo_qwen_hidden.store.files import naming_full_disk, sync_folder, write_durably
from nemo_qwen_hidden.store.folder import MARKER_FORMAT, Contents, remove, remove_if_empty, survey
from nemo_qwen_hidden.store.format import DTYPES, MANIFEST, MARKER, PARTIAL, TOKENS, human_bytes, shard_name
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import shard_header

Written = Mapping[tuple[HookPoint, int], int]


def check_target(path: Path, *, overwrite: bool) -> None:
    """Whether a store can be made at ``path``; leaves everything as it is.

    Raises:
        StoreError: something else is there, or a store and not ``overwrite``; or the folder cannot be written.
    """
    with _naming_path(path):
        existing = _nearest_existing(path)
        if existing == path:
            _check_contents(path, survey(path), overwrite=overwrite)
        with tempfile.TemporaryFile(dir=existing):  # the only sure answer: rights, read-only mounts, odd file systems
            pass


def check_space(path: Path, needed_bytes: int) -> None:
    """Whether the disk of ``path`` has room for a store of ``needed_bytes``, before any shard is written.

    What is there of ours counts as free: before ``begin`` an earlier store, which goes; after it the token table,
    which is part of what is needed.

    Raises:
        StoreError: it has not; says how much is needed and how much is free.
    """
    with _naming_path(path):
        existing = _nearest_existing(path)
        disk = os.statvfs(existing)
        free = disk.f_bavail * disk.f_frsize
        if existing == path:
            free += survey(path).bytes
    if free < needed_bytes:
        rule = f"must be on a disk with {human_bytes(needed_bytes)} free, and {human_bytes(free)} are free there"
        raise StoreError("store.path", rule, str(path))


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A hidden temporary folder beside ``path``, for a token table that is written before ``begin``.

    Folders above it that it had to make go again where the block raised.

    Raises:
        StoreError: the folder cannot be made.
    """
    parent = path.absolute().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]  # the deepest first
    try:
        with _naming_path(path):
            parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=parent)
        with folder as name:
            yield Path(name)
    except BaseException:
        for folder_made in made:
            if folder_made.exists():
                remove_if_empty(folder_made)
        raise


def begin(path: Path, description: Mapping[str, Any], *, overwrite: bool, staged: Path | None = None) -> None:
    """Makes the folder and marks it as a store under construction; an earlier store there is deleted.

    Args:
        description: what is being made, JSON values, kept in the marker.
        staged: a folder of ``staging`` whose token table becomes the store's.

    Raises:
        StoreError: as ``check_target``.
    """
    check_target(path, overwrite=overwrite)
    with _naming_path(path):
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        before = survey(path)
        marker = {
            "format": MARKER_FORMAT,
            "version": 1,
            "description": dict(description),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "made_folder": made or bool(before.marker and before.marker.get("made_folder")),
        }
        # marker before deletion: at every moment the folder is a whole store or says that it is unfinished
        try:
            write_durably(path / MARKER, to_json(marker))
        except OSError:
            if made:
                remove_if_empty(path)
            raise
        if made:
            sync_folder(path.parent)
        _clear(path, before)
        if staged is not None:
            os.rename(staged / TOKENS, path / TOKENS)
            sync_folder(path)


def finish(path: Path, manifest: Manifest, *, written: Written) -> Manifest:
    """Turns what all ranks have written and closed into a store; returns its manifest, with the shards in it.

    Args:
        manifest: everything but the shards.
        written: rows written of each hook point and shard, added up over all ranks.

    Raises:
        CoverageError: rows are missing or were written twice; nothing is claimed.
        StoreError: no space is left for the manifest.
    """
    _check_coverage(manifest, written)
    points = tuple(_finish_point(path, manifest, entry) for entry in manifest.hook_points)
    finished = replace(manifest, hook_points=points)
    text = finished.to_json()
    Manifest.from_json(text, str(path / MANIFEST))  # what could not be read back is not written
    sync_folder(path)
    write_durably(path / MANIFEST, text)
    (path / MARKER).unlink()
    sync_folder(path)
    return finished


def discard(path: Path) -> None:
    """Deletes an unfinished store, and its folder if ``begin`` made that; does nothing where there is none.

    Only files of ours go: what else has come into the folder stays, and the folder with it.

    Raises:
        StoreError: the store is finished.
    """
    if not path.is_dir():
        return
    contents = survey(path)
    if contents.finished:
        raise StoreError("store.path", "must be an unfinished store to be discarded", str(path))
    if contents.marker is None:
        return
    _clear(path, contents)
    remove([path / MARKER])
    sync_folder(path)
    if contents.marker.get("made_folder") and not path.is_symlink():
        remove_if_empty(path)


def _check_contents(path: Path, contents: Contents, *, overwrite: bool) -> None:
    if contents.foreign:
        stranger = contents.foreign[0]
        rule = f"must be a new folder, an empty one or a store; this one holds `{stranger}`, which is part of none"
        raise StoreError("store.path", rule, str(path))
    if contents.finished and not overwrite:
        raise StoreError("store.overwrite", f"must be true to replace the finished store at {path}", overwrite)
    if contents.marker is not None and not overwrite:
        rule = f"must be true to start again the unfinished store at {path} ({contents.begun})"
        raise StoreError("store.overwrite", rule, overwrite)


def _nearest_existing(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists."""
    existing = path.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        rule = "must be a folder" if existing == path.absolute() else f"must lie in a folder, and {existing} is none"
        raise StoreError("store.path", rule, str(path))
    return path if existing == path.absolute() else existing


def _clear(path: Path, contents: Contents) -> None:
    """Deletes what is ours, but for the marker: the manifest first, so that nothing is claimed of what is going."""
    remove([path / MANIFEST])
    sync_folder(path)
    remove(file for file in contents.files if file != path / MARKER)
    for folder in contents.folders:
        remove_if_empty(folder)


def _check_coverage(manifest: Manifest, written: Written) -> None:
    grid = manifest.grid
    expected = {
        (entry.point, shard): len(grid.rows_of(shard)) for entry in manifest.hook_points for shard in range(grid.shards)
    }
    wrong = [key for key in {**expected, **written} if expected.get(key, 0) != written.get(key, 0)]
    if wrong:
        shown = "; ".join(
            f"{point}, shard {shard}: {written.get((point, shard), 0)} of {expected.get((point, shard), 0)} rows"
            for point, shard in wrong[:5]
        )
        more = f"; and {len(wrong) - 5} more shards" if len(wrong) > 5 else ""
        raise CoverageError(f"not every row was written exactly once: {shown}{more}")


def _finish_point(path: Path, manifest: Manifest, entry: HookPointEntry) -> HookPointEntry:
    """Gives the shards of one hook point their final names; their bytes are durable already."""
    folder, grid, shards = path / str(entry.point), manifest.grid, []
    for shard in range(grid.shards):
        rows = grid.rows_of(shard)
        start, header = shard_header(
            entry.point, rows, hidden_size=manifest.hidden_size, dtype=DTYPES[manifest.stored_dtype]
        )
        partial, final = folder / (shard_name(shard) + PARTIAL), folder / shard_name(shard)
        with open(partial, "rb") as file:
            if file.read(len(start)) != start or os.fstat(file.fileno()).st_size != header.size_bytes:
                raise CoverageError(f"{partial} was changed by something else while it was written")
        os.rename(partial, final)
        name = str(final.relative_to(path))
        shards.append(ShardEntry(file=name, first_row=rows.start, rows=len(rows), bytes=header.size_bytes))
    sync_folder(folder)
    return replace(entry, shards=tuple(shards))


@contextmanager
def _naming_path(path: Path) -> Iterator[None]:
    """Turns what the file system says about ``path`` into a StoreError that names the setting."""
    try:
        with naming_full_disk(path, MARKER):
            yield
    except OSError as error:
        rule = f"must be a folder that can be made and written ({error.strerror})"
        raise StoreError("store.path", rule, str(path)) from error
