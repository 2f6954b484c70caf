"""States out of shards on this machine. All maps lie in one region of addresses, so that states of any number of shards
are gathered by one call, which copies each once.

Legend: n states asked for, H numbers in each.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.maps import map_tensors
from nemo_qwen_hidden.store.read.slots import Slots
from nemo_qwen_hidden.store.read.stored import Locator, StoredStates, check_shard
from nemo_qwen_hidden.store.shard import MOMENTS, NORMS
from nemo_qwen_hidden.store.statistics import Sums

THREADED_BYTES = 1 << 25  # below it threads are little gain, and on a busy machine they wait for each other
_SCALE_BYTES = 4


class MappedShards:
    """A ``ShardReader`` of the store in ``folder``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._dtype, self._widths = manifest.dtype, [entry.width for entry in manifest.hook_points]
        self._locator = Locator(manifest)
        self._slots: Slots | None = None
        self._making = threading.Lock()

    def consecutive(self, points: Sequence[int], first_state: int, count: int) -> list[StoredStates]:
        pieces = list(self._manifest.grid.pieces(first_state, count))
        for point in points if pieces else ():  # before memory is taken for states that a store may only claim to have
            self._opened.present(point, np.array([pieces[0][0]]))
        found = [StoredStates.empty(count, self._widths[point], self._dtype) for point in points]
        for shard, state, size in pieces:
            start, inside = state - first_state, state - self._manifest.grid.starts[shard]
            for point, out in zip(points, found, strict=True):
                self._copy(point, shard, inside, out[slice(start, start + size)])
        return found

    def scattered(self, points: Sequence[int], states: NDArray[np.int64]) -> list[StoredStates]:
        if not len(states):
            return self.consecutive(points, 0, 0)
        shards, inside = self._locator.find(states)
        return [self._gather(point, shards, inside) for point in points]

    def sums(self, point: int, shards: range) -> Iterator[Sums]:
        present = self._manifest.hook_points[point].present
        for shard in shards:
            listed = present[shard]
            header, tensors = map_tensors(self._folder, listed.file)
            check_shard(self._manifest, point, shard, header, str(self._folder / listed.file))
            yield Sums(moments=tensors[MOMENTS], norms=tensors[NORMS])

    @property
    def _opened(self) -> Slots:
        if self._slots is None:
            with self._making:
                self._slots = self._slots or Slots(self._folder, self._manifest)
        return self._slots

    def _copy(self, point: int, shard: int, inside: int, out: StoredStates) -> None:
        """Consecutive states of one shard, the first of which is its state ``inside``."""
        slots = self._opened
        with slots.holding():
            (slot,) = slots.present(point, np.array([shard]))
            start, size = int(slots.values[slot]) + inside * self._bytes_of(point), out.values.nbytes
            slots.ahead.consecutive(start, size)
            stored, values = slots.region.bytes[start : start + size], out.values.view(torch.uint8).view(-1)
            if size < THREADED_BYTES:
                values.numpy()[:] = stored
            else:
                values.copy_(torch.from_numpy(stored))
            if out.scale is not None:
                start, size = int(slots.scales[slot]) + inside * _SCALE_BYTES, out.scale.nbytes
                out.scale.numpy().view(np.uint8)[:] = slots.region.bytes[start : start + size]

    def _gather(self, point: int, shards: NDArray[np.int64], inside: NDArray[np.int64]) -> StoredStates:
        """States by shard and place in it, both [n]."""
        slots = self._opened
        with slots.holding():
            held = slots.of_shard[point][shards]
            if (held < 0).any():
                distinct = np.unique(shards)
                if len(distinct) > slots.count:
                    return self._gather_by_halves(point, shards, inside, middle=distinct[len(distinct) // 2])
                held = slots.present(point, distinct)[np.searchsorted(distinct, shards)]
            slots.use(held)
            starts = slots.values[held] + inside * self._bytes_of(point)
            slots.ahead.scattered(starts, self._bytes_of(point))
            scale = None
            if self._dtype.scaled:
                starts_4 = slots.scales[held] + inside * _SCALE_BYTES
                scale = _windows(slots.region.bytes, _SCALE_BYTES)[starts_4].reshape(-1).view("<f4")
            return StoredStates.of(self._states_at(starts, self._widths[point]), scale, self._dtype)

    def _bytes_of(self, point: int) -> int:
        """Of one state."""
        return self._widths[point] * self._dtype.bytes

    def _states_at(self, starts: NDArray[np.int64], width: int) -> NDArray[Any]:
        """[n, H], from the bytes of the region at which they start, multiples of what an item has."""
        items = self._opened.region.bytes.view(self._dtype.container)
        states_H, places = _windows(items, width), starts // items.itemsize
        if len(starts) * width * items.itemsize < THREADED_BYTES:
            found: NDArray[Any] = states_H[places]
            return found
        found = np.empty((len(starts), width), items.dtype)
        torch.index_select(torch.from_numpy(states_H), 0, torch.from_numpy(places), out=torch.from_numpy(found))
        return found

    def _gather_by_halves(
        self, point: int, shards: NDArray[np.int64], inside: NDArray[np.int64], *, middle: int
    ) -> StoredStates:
        """Of more shards than there are slots."""
        halves = [np.flatnonzero(half) for half in (shards < middle, shards >= middle)]
        found = [self._gather(point, shards[places], inside[places]) for places in halves]
        out = StoredStates.empty(len(shards), self._widths[point], self._dtype)
        for places, states in zip(halves, found, strict=True):
            out.put(torch.from_numpy(places), states)
        return out


def _windows(items: NDArray[Any], size: int) -> NDArray[Any]:
    """[places, size], the items from each place on: they overlap, so that one number says where a state is, in
    whichever shard."""
    return as_strided(items, (len(items) - size + 1, size), (items.itemsize, items.itemsize))
