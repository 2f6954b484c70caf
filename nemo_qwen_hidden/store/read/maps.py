"""Files of a store as read-only arrays in memory maps: nothing is read before it is indexed.

mmap(2) is called by itself: Python's ``mmap`` keeps a descriptor open for every map, of which a process may have 1,024,
and cannot put a map at an address. For Linux; the numbers are macOS's too.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.store.files import open_inside
from nemo_qwen_hidden.store.format import DTYPES
from nemo_qwen_hidden.store.header import Header, TensorSpec, read_header

# BF16, which numpy lacks, stands as integers of its bits
NUMPY_DTYPES = {dtype.safetensors: dtype.container for dtype in DTYPES.values()} | {
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_PROT_NONE, _MAP_FIXED = 0, 0x10  # of Linux and macOS; the mmap module has no names for them
_FAILED = ctypes.c_void_p(-1).value


class Region:
    """Addresses set aside, onto which files can be mapped at any page; nothing is there before. They are given back
    when neither the region nor an array of it is left.

    Args:
        size: in bytes. alignment: of its address, a power of two.

    Attributes:
        bytes: uint8 [size]. Reading where no file is mapped, or writing anywhere, ends the process.

    Raises:
        OSError: so many addresses are not to be had.
    """

    def __init__(self, size: int, alignment: int = mmap.PAGESIZE) -> None:
        reserved = size + alignment - mmap.PAGESIZE
        start = _mmap(None, reserved, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self._address = start + -start % alignment
        memory = (ctypes.c_uint8 * size).from_address(self._address)
        weakref.finalize(memory, _libc().munmap, start, reserved).atexit = False
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(memory)

    def map(self, offset: int, descriptor: int, size: int) -> None:
        """Puts the first ``size`` bytes of an open file, of at least that many, at byte ``offset``, a multiple of
        ``mmap.PAGESIZE``, in place of what was there. The file may be closed afterwards.

        Raises:
            OSError: it cannot be mapped; the process has too many maps, say.
        """
        if offset < 0 or offset % mmap.PAGESIZE or offset + size > len(self.bytes):
            raise ValueError(f"{size} bytes at {offset} are not pages of a region of {len(self.bytes)}")
        _mmap(self._address + offset, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)

    def advise(self, offset: int, size: int, advice: int) -> None:
        """madvise(2) about the pages of some bytes, e.g. ``mmap.MADV_WILLNEED``. Only ever a hint."""
        page = offset - offset % mmap.PAGESIZE
        _libc().madvise(self._address + page, offset + size - page, advice)

    def in_memory(self, offsets: Iterable[int]) -> bool:
        """Whether the pages of some mapped bytes are all in memory, by mincore(2); True where the system hides it."""
        mincore, page, state = _libc().mincore, mmap.PAGESIZE, ctypes.c_uint8(1)
        found = ctypes.byref(state)
        for offset in offsets:
            mincore(self._address + offset - offset % page, page, found)
            if not state.value & 1:
                return False
        return True


def map_file(descriptor: int, size: int) -> NDArray[np.uint8]:
    """uint8 [size], read-only: the first bytes of an open file, which may be closed afterwards."""
    if not size:  # a map of no bytes is an error
        return np.empty(0, np.uint8)
    region = Region(size)
    region.map(0, descriptor, size)
    region.bytes.flags.writeable = False
    return region.bytes


def map_tensors(folder: Path, name: str) -> tuple[Header, dict[str, NDArray[Any]]]:
    """The header and the tensors of safetensors file ``name`` of a store.

    Raises:
        StoreError: the file is absent, truncated, or not what its header says; names the file.
    """
    descriptor = open_inside(folder, name)
    try:
        header = read_header(descriptor, str(folder / name))
        data = map_file(descriptor, header.size_bytes)
    finally:
        os.close(descriptor)
    return header, {tensor: view_of(data, spec, header.offsets[tensor]) for tensor, spec in header.tensors.items()}


def map_bytes(folder: Path, name: str) -> NDArray[np.uint8]:
    """The bytes of file ``name`` of a store.

    Raises:
        StoreError: the file is absent or cannot be read.
    """
    descriptor = open_inside(folder, name)
    try:
        return map_file(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def view_of(data: NDArray[np.uint8], spec: TensorSpec, offset: int) -> NDArray[Any]:
    """The tensor ``spec`` that begins at byte ``offset`` of ``data``, without a copy."""
    return data[offset : offset + spec.bytes].view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = address, (address, size, number, number, number, ctypes.c_long)
    libc.munmap.argtypes, libc.madvise.argtypes = (address, size), (address, size, number)
    libc.mincore.argtypes = (address, size, address)
    return libc


def _mmap(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found: int = _libc().mmap(address, size, protection, flags, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found
