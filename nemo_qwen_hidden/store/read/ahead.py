"""Has Linux read what will be asked for, much of it at a time, instead of each page when it is met."""

import mmap
import os

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.store.read.maps import Region

WINDOW_BYTES = 1 << 17  # what Linux reads by itself around a page that it lacks
_SAMPLES = 4


class ReadAhead:
    """For the files mapped onto a region.

    As long as they fit into memory, whole windows are read around rows: the rest of them will be wanted too, and large
    reads are fast. Once they do not, rows alone are read.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._bytes = 0
        self._fits = True

    def count(self, size: int) -> None:
        """Files of ``size`` bytes more are going to be read."""
        self._bytes += size
        if self._fits and self._bytes > memory_bytes():
            self._fits = False
            self.mapped(0, len(self._region.bytes))

    def mapped(self, offset: int, size: int) -> None:
        """A file lies at these bytes from now on."""
        if not self._fits:
            self._region.advise(offset, size, mmap.MADV_RANDOM)

    def consecutive(self, offset: int, size: int) -> None:
        """These bytes will be read."""
        if size > WINDOW_BYTES:
            self._region.advise(offset, size, mmap.MADV_WILLNEED)

    def scattered(self, offsets: NDArray[np.int64], size: int) -> None:
        """``size`` bytes at each of ``offsets``, [n], will be read. Nothing is done where a sample of them is in memory
        already: asking for all would take longer than reading."""
        if self._region.in_memory(offsets[:: max(1, len(offsets) // _SAMPLES)].tolist()):
            return
        window = WINDOW_BYTES if self._fits else mmap.PAGESIZE
        first, last = offsets // window, (offsets + size - 1) // window
        for number in np.unique(np.concatenate([first, last] if size <= window else [first])).tolist():
            self._region.advise(number * window, max(window, size), mmap.MADV_WILLNEED)


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
