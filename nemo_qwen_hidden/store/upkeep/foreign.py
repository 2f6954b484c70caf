"""What lies in a store's folder that is no part of the store. No link is followed."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.format import (
    FINAL_NORM_FILE,
    JOURNAL,
    JOURNAL_FOLDER_FILES,
    MANIFEST,
    MARKER,
    PARTIAL,
    SHARD_FILES,
    STAGED,
    TEMPORARY,
    TOKEN_FILES,
    TOKENS,
    shard_name,
)
from nemo_qwen_hidden.store.manifest import Manifest


def strangers(folder: Path, manifest: Manifest, target: Manifest | None, *, grows: bool) -> Iterator[tuple[str, str]]:
    """Name in the folder of each such thing, and what is wrong with it in words.

    A job that was ended while it wrote leaves a journal and files under temporary names, which are no strangers.

    Args:
        target: what an unfinished job is making, whose files may be there. grows: whether it adds parts, so that files
            of later ones may be there too.

    Raises:
        StoreError: a folder cannot be read.
    """
    listed = {file.file for file in manifest.files()}
    folders = {TOKENS, JOURNAL, *map(str, manifest.points)}
    if target is not None:
        listed |= set(_expected(target))
        folders |= set(map(str, target.points))
    for name, mode in _entries(folder):
        if stat.S_ISDIR(mode) and name in folders:
            yield from _inside(folder, name, listed, _first_new(name, manifest) if grows else None)
        elif not (stat.S_ISREG(mode) and (name in (MANIFEST, MARKER) or name in listed or _is_temporary(name))):
            yield name, f"must be a part of the store, which has no such {_kind(mode)}"


def _first_new(folder: str, manifest: Manifest) -> int:
    """The number that the first file in a folder has which belongs to a part that the manifest does not list."""
    return len(manifest.parts) if folder == TOKENS else manifest.grid.shards


def _inside(folder: Path, parent: str, listed: set[str], first_new: int | None) -> Iterator[tuple[str, str]]:
    for child, mode in _entries(folder / parent):
        name = f"{parent}/{child}"
        if parent == JOURNAL:
            known = _is_journal(child, mode)
        else:
            known = stat.S_ISREG(mode) and (name in listed or (parent == TOKENS and _is_temporary(name)))
            known |= stat.S_ISREG(mode) and first_new is not None and _is_later(parent, child, first_new)
        if not known:
            yield name, f"must be a part of the store, which has no such {_kind(mode)}"


def _is_later(parent: str, child: str, first_new: int) -> bool:
    """Whether a file is one of a part that is being added."""
    ours = (TOKEN_FILES if parent == TOKENS else SHARD_FILES).fullmatch(child)
    return ours is not None and int(child.partition(".")[0]) >= first_new


def _expected(target: Manifest) -> Iterator[str]:
    """Files of a store that is being made."""
    yield from (file.file for file in target.files())
    for point, shard in target.missing():
        yield from (f"{point}/{shard_name(shard)}{end}" for end in ("", PARTIAL))


def _is_temporary(name: str) -> bool:
    top = name in {file + TEMPORARY for file in (MANIFEST, MARKER, FINAL_NORM_FILE)}
    parent, _, child = name.rpartition("/")
    return top or (parent == TOKENS and child.endswith(TEMPORARY) and TOKEN_FILES.fullmatch(child) is not None)


def _is_journal(name: str, mode: int) -> bool:
    if stat.S_ISDIR(mode):
        return name == STAGED
    return stat.S_ISREG(mode) and JOURNAL_FOLDER_FILES.fullmatch(name) is not None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link"}
    return kinds.get(stat.S_IFMT(mode), "device, pipe or socket")


def _entries(folder: Path) -> list[tuple[str, int]]:
    """Name and mode of what lies in a folder, sorted; less what a job at work takes away meanwhile.

    Raises:
        StoreError: the folder cannot be read.
    """
    found: list[tuple[str, int]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    found.append((entry.name, entry.stat(follow_symlinks=False).st_mode))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(str(folder), "must be a folder that can be read", error.strerror) from error
    return sorted(found)
