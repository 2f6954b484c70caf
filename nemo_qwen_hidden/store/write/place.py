"""The folder that a store is made in, or added to: whether it can be, has room, and nobody else is at work there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.files import naming_full_disk
from nemo_qwen_hidden.store.folder import remove_if_empty, survey
from nemo_qwen_hidden.store.format import JOURNAL, MANIFEST, MARKER, TOKENS, human_bytes
from nemo_qwen_hidden.store.write.locks import job_lock


def check_target(path: Path) -> None:
    """Whether a job can work at ``path``; leaves everything as it is.

    Raises:
        StoreError: something else than a store is there; or the folder cannot be written.
    """
    with naming_path(path):
        existing = _nearest_existing(path)
        if existing == path:
            contents = survey(path)
            if contents.foreign and not contents.finished and (path / MANIFEST).is_file() and (path / TOKENS).is_dir():
                rule = "must be the manifest of a store; it is damaged, or of something else: take it from a copy, or "
                raise StoreError(str(path / MANIFEST), f"{rule}delete the folder to start again", "unreadable")
            if contents.foreign:
                stranger = contents.foreign[0]
                rule = f"must be a new folder, an empty one or a store; this one holds `{stranger}`, part of none"
                raise StoreError("store.path", rule, str(path))
        with tempfile.TemporaryFile(dir=existing):  # the only sure answer: rights, read-only mounts, odd file systems
            pass


def check_space(path: Path, needed_bytes: int, *, replaced: bool = False) -> None:
    """Whether the disk of ``path`` has room for ``needed_bytes`` more. replaced: what is there of ours goes first.

    Raises:
        StoreError: it has not; says how much is needed and how much is free.
    """
    with naming_path(path):
        existing = _nearest_existing(path)
        disk = os.statvfs(existing)
        free = disk.f_bavail * disk.f_frsize
        if replaced and existing == path:
            free += survey(path).bytes
    if free < needed_bytes:
        rule = f"must be on a disk with {human_bytes(needed_bytes)} free, and {human_bytes(free)} are free there"
        raise StoreError("store.path", rule, str(path))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While entered, no other job works on the store at ``path``. Makes the folder, and folders above it; takes away
    again what it has made and nobody has used.

    Raises:
        StoreError: as ``check_target``, or another job is at work and says who.
    """
    check_target(path)
    made = [folder for folder in (path, *path.absolute().parents) if not folder.exists()]  # the deepest first
    with ExitStack() as stack:
        stack.callback(_remove_unused, made)
        with naming_path(path):
            stack.enter_context(job_lock(path))
        stack.callback(_tidy, path)  # before the lock goes, and its file with it
        check_target(path)
        yield


def exists(path: Path) -> bool:
    """Whether there is a store at ``path``, finished or not."""
    return (path / MANIFEST).exists() or (path / MARKER).exists()


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Turns what the file system says about ``path`` into a StoreError that names the setting."""
    try:
        with naming_full_disk(path, MARKER):
            yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        rule = f"must be a folder that can be made and written ({error.strerror})"
        raise StoreError("store.path", rule, str(path)) from error


def _nearest_existing(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists."""
    existing = path.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        rule = "must be a folder" if existing == path.absolute() else f"must lie in a folder, and {existing} is none"
        raise StoreError("store.path", rule, str(path))
    return path if existing == path.absolute() else existing


def _tidy(path: Path) -> None:
    """Takes the journal away where no job is unfinished. Who waits for a lock in it finds it gone and makes another, or
    makes one in it at this very moment and keeps it."""
    if not (path / MARKER).exists() and (path / JOURNAL).is_dir():
        shutil.rmtree(path / JOURNAL, ignore_errors=True)


def _remove_unused(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir():
            remove_if_empty(folder)
