"""How a rank takes memory from the kernel and gives it back.

Tensors of many sizes leave gaps in glibc's heap, so that a rank holds more and more over hours though what is in use
stays the same (glibc 2.36, torch 2.13; ``benchmarks/memory.py`` measures it).
"""

import ctypes
import os
from pathlib import Path

MOST_KEPT_BYTES = 32 * 2**20


def use_large_pages() -> None:
    """Has torch ask Linux for pages of 2 MB for its larger tensors, unless the environment says otherwise; to be called
    before torch allocates any.

    A tensor of some megabytes is new memory from the kernel each time that it is made, which comes in pages of 4 KB
    otherwise, zeroed one by one (torch 2.13, ``c10/core/impl/alloc_cpu.cpp``).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class HeapTrimmer:
    """``trim`` hands freed heap back whenever more than ``MOST_KEPT_BYTES`` have come since it last did; elsewhere than
    on glibc it does nothing."""

    def __init__(self) -> None:
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._floor_bytes = _anonymous_bytes() if self._malloc_trim else 0

    def trim(self) -> None:
        if self._malloc_trim and _anonymous_bytes() > self._floor_bytes + MOST_KEPT_BYTES:
            self._malloc_trim(0)
            self._floor_bytes = _anonymous_bytes()


def _anonymous_bytes() -> int:
    """Memory of this process's own, from the kernel (proc(5), ``statm``)."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
