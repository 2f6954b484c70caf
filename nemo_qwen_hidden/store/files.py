"""Files that are there whole or not at all, and that never lie outside the store's folder."""

import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.format import TEMPORARY

_ODD = re.compile("[\\\\\0\ud800-\udfff]")  # lone surrogates: no file system has them
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_SYNCED_AT_ONCE = 8
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def check_name(name: str, *, setting: str) -> str:
    """``name``, a file's path relative to the store's folder, in POSIX form.

    Raises:
        StoreError: absolute, or with ``..`` or anything else that is not a plain name; names ``setting``.
    """
    path = PurePosixPath(name)
    odd = _ODD.search(name) is not None
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name or odd:
        raise StoreError(setting, "must be a plain path inside the store's folder", name)
    return name


def open_inside(folder: Path, name: str) -> int:
    """A descriptor, for reading, of regular file ``name`` of a store; the caller closes it.

    ``folder`` may be a symbolic link; below it none is followed, so nothing outside is ever opened.

    Raises:
        StoreError: the file is absent, cannot be read, is not a regular file, or a symbolic link stands on the way.
    """
    rule = "must be a regular file, reached through no symbolic link, that can be read"
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # not to wait for ever at a pipe
    try:
        descriptor = os.open(folder, flags | os.O_DIRECTORY)
        for part in PurePosixPath(name).parts:
            above = descriptor
            try:
                descriptor = os.open(part, flags | os.O_NOFOLLOW, dir_fd=above)
            finally:
                os.close(above)
    except OSError as error:
        raise StoreError(str(folder / name), rule, error.strerror) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise StoreError(str(folder / name), rule, stat.filemode(mode))
    return descriptor


def read_inside(folder: Path, name: str) -> bytes:
    """All of file ``name`` of a store, opened as by ``open_inside``."""
    with os.fdopen(open_inside(folder, name), "rb") as file:
        return file.read()


def read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on, however many calls that takes; EOFError where the file ends before."""
    parts, left = [], size
    while left:
        parts.append(os.pread(descriptor, left, offset + size - left))
        if not parts[-1]:
            raise EOFError(f"the file ends {left} bytes too early")
        left -= len(parts[-1])
    return b"".join(parts)


def read_into(descriptor: int, memory: memoryview, offset: int) -> None:
    """Fills ``memory`` with the bytes from ``offset`` on; EOFError where the file ends before."""
    while memory:
        count = os.preadv(descriptor, [memory], offset)
        if not count:
            raise EOFError(f"the file ends {len(memory)} bytes too early")
        memory, offset = memory[count:], offset + count


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of ``data`` at ``offset``, however many calls that takes; the file position stays."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(descriptor, left, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        left, offset = left[written:], offset + written


def start_writing_back(descriptor: int) -> None:
    """Has Linux begin to write to the disk what it holds of a file, and does not wait for that; makes nothing durable.
    Nothing happens where the system lacks the call, as some sandboxes do: it is a hint, and ``fsync`` comes later.

    Raises:
        OSError: what the disk has reported.
    """
    if _libc().sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE):
        number = ctypes.get_errno()
        if number != errno.ENOSYS:
            raise OSError(number, os.strerror(number))


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return libc


def write_durably(path: Path, data: bytes) -> None:
    """Puts ``data`` at ``path`` so that after a crash either all of it is there or what was there before."""
    temporary = path.with_name(path.name + TEMPORARY)
    with naming_full_disk(path.parent, path.name):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Returns when the names in ``folder`` are durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Returns when the content of a file is durable, whoever has written it."""
    _sync(path, os.O_RDWR | os.O_NOFOLLOW)


def sync_files(paths: Iterable[Path]) -> None:
    """Returns when the content of files is durable: several at a time, which small ones take much less time for."""
    with ThreadPoolExecutor(_SYNCED_AT_ONCE, "syncing") as pool:
        for _ in pool.map(sync_file, paths):
            pass


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_full_disk(folder: Path, what: str) -> Iterator[None]:
    """Turns "no space left", "quota exceeded" and "file too large" into a StoreError.

    Args:
        folder: the store's. what: is being written there, for the error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        rule = f"must have room for the store ({error.strerror} while writing {what})"
        raise StoreError("store.path", rule, str(folder)) from error


@contextmanager
def naming_store(folder: Path, what: str) -> Iterator[None]:
    """``naming_full_disk``, and the same for a store that vanishes, or may not be written any more, while a job works
    on it."""
    try:
        with naming_full_disk(folder, what):
            yield
    except OSError as error:
        if error.errno not in (*_GONE, *_CLOSED):
            raise
        rule = "must stay where it is while it is written" if error.errno in _GONE else "must stay writable"
        rule += f" ({error.strerror} while writing {what})"
        raise StoreError("store.path", rule, str(folder)) from error
