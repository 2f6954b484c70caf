"""One file of a store while it is checked: opened inside of the folder, read once from its start, hashed on the way."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import FileEntry, ShardEntry
from nemo_qwen_hidden.store.files import open_inside

BytesReport = Callable[[int, int], None]
"""Called with the bytes that are done, and all there are; from any thread, one at a time."""

BLOCK_BYTES = 1 << 22
_MOST_WORDS = 400


def no_report(done: int, total: int) -> None:
    """Shows nothing."""


class Meter:
    """Adds up the bytes that several threads have done."""

    def __init__(self, report: BytesReport, total: int) -> None:
        self._report, self._total, self._done = report, total, 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._report(self._done, self._total)


class CheckedFile:
    """An open file of a store, whose size is the one that the manifest lists.

    Attributes:
        name: for errors. bytes: its size.
    """

    def __init__(self, descriptor: int, name: str, size: int, meter: Meter) -> None:
        self.descriptor, self.name, self.bytes = descriptor, name, size
        self._meter, self._hash, self._place = meter, hashlib.sha256(), 0
        self._buffer = np.empty(0, np.uint8)

    def at(self, start: int, size: int) -> NDArray[np.uint8]:
        """uint8 [size], the bytes from ``start`` on.

        Raises:
            StoreError: the file has become shorter.
        """
        found = np.empty(size, np.uint8)
        self._fill(found, start)
        return found

    def take(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], the next bytes, which count towards ``sha256``; valid until the next call.

        Raises:
            StoreError: the file has become shorter.
        """
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        block = self._buffer[:size]
        self._fill(block, self._place)
        self._hash.update(block.data)
        self._place += size
        self._meter.add(size)
        return block

    def pass_over(self, stop: int) -> None:
        """Takes the bytes up to ``stop`` for the hash alone."""
        while self._place < stop:
            self.take(min(BLOCK_BYTES, stop - self._place))

    def sha256(self) -> str:
        """Of the whole file, the rest of which is read now."""
        self.pass_over(self.bytes)
        return self._hash.hexdigest()

    @property
    def left(self) -> int:
        """Bytes that nobody has taken."""
        return self.bytes - self._place

    def _fill(self, block: NDArray[np.uint8], start: int) -> None:
        view = block.data
        while view:
            count = os.preadv(self.descriptor, [view], start)
            if not count:
                raise StoreError(self.name, f"must stay {self.bytes} bytes long while it is read", start)
            view, start = view[count:], start + count


@contextmanager
def checked_file(folder: Path, entry: FileEntry | ShardEntry, meter: Meter) -> Iterator[CheckedFile]:
    """The file that ``entry`` lists.

    Raises:
        StoreError: as ``open_inside``, or it has another size.
    """
    name, left = str(folder / entry.file), entry.bytes
    try:
        descriptor = open_inside(folder, entry.file)
        try:
            size = os.fstat(descriptor).st_size
            if size != entry.bytes:
                raise StoreError(name, f"must be {entry.bytes} bytes long, as the manifest says", size)
            file = CheckedFile(descriptor, name, size, meter)
            yield file
            left = file.left
        finally:
            os.close(descriptor)
    finally:
        meter.add(left)


def digest_problem(file: CheckedFile, sha256: str) -> str | None:
    """What is wrong with the SHA-256 of a file, in words."""
    found = file.sha256()
    if found == sha256:
        return None
    return f"must have the SHA-256 {sha256[:12]}..., as the manifest says, but has {found[:12]}..."


def words_of(error: StoreError, name: str) -> str:
    """What ``error`` says about file ``name``, without that name, and never pages of it."""
    place = error.setting.removeprefix(name).removeprefix(": ")
    return short(f"{place} {error.rule}, but is {error.value!r}".strip())


def short(text: str) -> str:
    """``text``, cut where it is very long."""
    return text if len(text) <= _MOST_WORDS else f"{text[:_MOST_WORDS]}..."
