"""Shards in memory maps that all lie in one region of addresses. A slot is a place in it that takes one shard."""

import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.files import open_inside
from nemo_qwen_hidden.store.header import read_header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.ahead import ReadAhead
from nemo_qwen_hidden.store.read.maps import Region
from nemo_qwen_hidden.store.read.stored import check_shard
from nemo_qwen_hidden.store.shard import SCALE

MOST_MAPS = 16_384  # of one store; Linux gives a process 65,530
MOST_ADDRESSES_BYTES = 1 << 45  # of the 2**47 that a process has
_OPEN_TOGETHER = 64
_HUGE_PAGE_BYTES = 1 << 21  # Linux maps large files in such pages where they lie at multiples of them


class Slots:
    """Opens and checks shards, and gives each a slot; when none is free, those used least recently make room.

    Attributes:
        region: where the slots are. ahead: for what will be read of it. count: of slots. of_shard: int64 [hook points,
            shards], the slot of each, -1 where it has none. values, scales: int64 [slots], byte of the region at which
            the values of the shard in a slot begin, and its scales.

    Raises (every method that opens):
        StoreError: a shard is missing or is not what the manifest says; names the file.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        entries = manifest.hook_points
        largest = max(shard.bytes for entry in entries for shard in entry.present)
        widest = max(entry.width for entry in entries)
        if largest < widest * manifest.dtype.bytes:
            raise StoreError(str(folder), f"must have shards that hold states of {widest} values", largest)
        self._alignment = _HUGE_PAGE_BYTES if largest >= _HUGE_PAGE_BYTES else mmap.PAGESIZE
        self._slot_bytes = -(-largest // self._alignment) * self._alignment
        shards = manifest.grid.shards * len(entries)
        self.region, self.count = self._reserve(
            min(shards, MOST_MAPS, max(1, MOST_ADDRESSES_BYTES // self._slot_bytes))
        )
        self.ahead = ReadAhead(self.region)
        self.of_shard = np.full((len(entries), manifest.grid.shards), -1, np.int64)
        self.values, self.scales = np.zeros(self.count, np.int64), np.zeros(self.count, np.int64)
        self._owner, self._used = np.zeros(self.count, np.int64), np.zeros(self.count, np.int64)
        self._free = list(range(self.count))[::-1]
        self._uses = 0
        self._counted: set[int] = set()
        self._crowded = self.count < shards
        self._lock, self._process = threading.RLock(), os.getpid()

    def holding(self) -> AbstractContextManager[object]:
        """Keeps shards in their slots, in case that other threads want others."""
        return self._lock_here() if self._crowded else nullcontext()

    def present(self, point: int, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots of some shards of a hook point, each given once and no more of them than there are slots. Within
        ``holding`` they stay there until the next call."""
        with self._lock_here():
            slots = self.of_shard[point]
            missing = shards[slots[shards] < 0]
            self.use(slots[shards[slots[shards] >= 0]])
            if len(missing) > len(self._free):
                self._evict(len(missing) - len(self._free))
            if point not in self._counted:
                self._counted.add(point)
                self.ahead.count(sum(shard.bytes for shard in self._manifest.hook_points[point].present))
            for start in range(0, len(missing), _OPEN_TOGETHER):
                self._map_together(point, missing[start : start + _OPEN_TOGETHER].tolist())
            found: NDArray[np.int64] = slots[shards]
            return found

    def use(self, slots: NDArray[np.int64]) -> None:
        """Notes that they are being used."""
        self._uses += 1
        self._used[slots] = self._uses

    def _evict(self, count: int) -> None:
        """Frees the slots used least recently. Their maps stay until others take their place."""
        taken = np.setdiff1d(np.arange(self.count), self._free)
        oldest = taken[np.argsort(self._used[taken], kind="stable")[:count]]
        self.of_shard.reshape(-1)[self._owner[oldest]] = -1
        self._free += oldest.tolist()

    def _map_together(self, point: int, shards: Sequence[int]) -> None:
        """Gives some shards slots. Their headers are asked for before the first is waited for."""
        entry = self._manifest.hook_points[point]
        with ExitStack() as stack:
            opened = []
            for shard in shards:
                listed = entry.shards[shard]
                assert listed is not None, "a manifest that from_json has passed lists every shard"
                descriptor = open_inside(self._folder, listed.file)
                stack.callback(os.close, descriptor)
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(descriptor, 0, 1, os.POSIX_FADV_WILLNEED)
                opened.append((shard, descriptor, str(self._folder / listed.file)))
            for shard, descriptor, file in opened:
                self._map(point, shard, descriptor, file)

    def _map(self, point: int, shard: int, descriptor: int, file: str) -> None:
        header = read_header(descriptor, file)
        check_shard(self._manifest, point, shard, header, file)
        slot = self._free[-1]
        offset = slot * self._slot_bytes
        try:
            self.region.map(offset, descriptor, header.size_bytes)
        except OSError as error:
            raise StoreError(file, "must be mapped into memory", error.strerror) from error
        self.ahead.mapped(offset, header.size_bytes)
        self.values[slot] = offset + header.offsets[str(self._manifest.hook_points[point].point)]
        self.scales[slot] = offset + header.offsets.get(SCALE, 0)
        self._owner[slot] = point * self._manifest.grid.shards + shard
        self.of_shard[point, shard] = self._free.pop()

    def _reserve(self, count: int) -> tuple[Region, int]:
        """A region of ``count`` slots, or of as many as the process may have."""
        while True:
            try:
                return Region(count * self._slot_bytes, self._alignment), count
            except OSError as error:
                if count == 1:
                    rule = f"must have shards that can be mapped into memory, of up to {self._slot_bytes} bytes"
                    raise StoreError(str(self._folder), rule, error.strerror) from error
            count //= 2

    def _lock_here(self) -> AbstractContextManager[object]:
        """The lock of this process: one that was forked may have got it locked, by a thread that it has not."""
        if self._process != os.getpid():
            self._lock, self._process = threading.RLock(), os.getpid()
        return self._lock
