"""What lies in a folder: a store, an unfinished one, nothing, or something that is not ours to touch."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.errors import ConfigError, StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.fields import load_json
from nemo_qwen_hidden.store.format import (
    FINAL_NORM_FILE,
    FORMAT,
    JOURNAL,
    JOURNAL_FOLDER_FILES,
    MANIFEST,
    MARKER,
    SHARD_FILES,
    STAGED,
    TEMPORARY,
    TOKEN_FILES,
    TOKENS,
)

MARKER_FORMAT = "nemo_qwen_hidden.unfinished"
_TOP = tuple(name + end for name in (MANIFEST, MARKER, FINAL_NORM_FILE) for end in ("", TEMPORARY))


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What ``survey`` found.

    finished: a manifest is there. marker: what ``unfinished.json`` says, None where there is none. files, folders:
    ours, by full path. foreign: names, relative to the folder, of entries that are not part of a store.
    """

    finished: bool
    marker: dict[str, Any] | None
    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    foreign: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """What our files take on disk."""
        return sum(path.lstat().st_blocks * 512 for path in self.files)

    @property
    def begun(self) -> str:
        """When, where and by whom the unfinished store was begun, in words."""
        return describe_marker(self.marker or {})


def describe_marker(marker: Mapping[str, Any]) -> str:
    """When, where and by whom an unfinished store was begun, in words."""
    return f"begun {marker.get('started')} by process {marker.get('pid')} on {marker.get('host')}"


def survey(folder: Path) -> Contents:
    """Looks through ``folder``, which exists. A symbolic link is never ours, and never followed."""
    while True:
        try:
            return _survey(folder)
        except FileNotFoundError:  # a run that ends at this moment takes its journal and marker away
            if not folder.exists():
                raise


def _survey(folder: Path) -> Contents:
    files: list[Path] = []
    folders: list[Path] = []
    foreign: list[str] = []
    for entry in _entries(folder):
        kind = _kind(entry)
        if entry.is_file(follow_symlinks=False) and entry.name in _TOP:
            files.append(folder / entry.name)
        elif entry.is_dir(follow_symlinks=False) and kind is not None:
            folders.append(folder / entry.name)
            for child in _entries(folder / entry.name):
                if entry.name == JOURNAL and child.name == STAGED and child.is_dir(follow_symlinks=False):
                    continue
                ours = child.is_file(follow_symlinks=False) and kind.fullmatch(child.name)
                if ours:
                    files.append(Path(child.path))
                else:
                    foreign.append(f"{entry.name}/{child.name}")
        else:
            foreign.append(entry.name)
    manifest = _json_of_ours(folder / MANIFEST, FORMAT, files)
    marker = _json_of_ours(folder / MARKER, MARKER_FORMAT, files)
    if manifest is None and marker is None:  # nothing says that these are parts of a store
        harmless = (path for path in (*folders, *files) if path.suffix == TEMPORARY or _of_journal(path, folder))
        foreign += [str(path.relative_to(folder)) for path in sorted({*folders, *files} - set(harmless))]
    else:
        claimed = {MANIFEST: manifest, MARKER: marker}
        foreign += [name for name, found in claimed.items() if folder / name in files and found is None]
    foreign_paths = {folder / name for name in foreign}
    return Contents(
        finished=manifest is not None,
        marker=marker,
        files=tuple(path for path in files if path not in foreign_paths),
        folders=tuple(path for path in folders if path not in foreign_paths),
        foreign=tuple(foreign),
    )


def _of_journal(path: Path, folder: Path) -> bool:
    """Whether ``path`` is what a job that has not begun yet makes to lock the folder."""
    return path == folder / JOURNAL or (path.parent == folder / JOURNAL and path.suffix == ".lock")


def remove(paths: Iterable[Path]) -> None:
    """Deletes files."""
    for path in paths:
        path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Deletes ``folder`` unless something is in it."""
    if not _entries(folder):
        folder.rmdir()


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _kind(entry: "os.DirEntry[str]") -> re.Pattern[str] | None:
    """What files of ours are called in a folder of this name, None where the folder is not ours."""
    if entry.name in (TOKENS, JOURNAL):
        return TOKEN_FILES if entry.name == TOKENS else JOURNAL_FOLDER_FILES
    try:
        HookPoint.parse(entry.name)
    except ConfigError:
        return None
    return SHARD_FILES


def _json_of_ours(path: Path, expected: str, files: list[Path]) -> dict[str, Any] | None:
    """What ``path`` holds, None where it is not there or not of this format."""
    if path not in files:
        return None
    try:
        found = load_json(path.read_bytes(), str(path))
    except StoreError:
        return None
    return found if found.get("format") == expected else None
