"""Giving freed memory back to the kernel.

Tensors of many sizes leave gaps in glibc's heap, so that a rank holds more and more over hours though what is in use
stays the same (glibc 2.36, torch 2.13; ``benchmarks/memory.py`` measures it).
"""

import ctypes
import os
from pathlib import Path

MOST_KEPT_BYTES = 32 * 2**20


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
