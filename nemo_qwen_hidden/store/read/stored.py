"""States as they lie in shards, and what gets them from there.

Everything here counts states. Legend: n states asked for, H numbers in each, the ``width`` of the hook point's entry.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.format import Dtype
from nemo_qwen_hidden.store.header import Header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import header_of
from nemo_qwen_hidden.store.statistics import Sums
from nemo_qwen_hidden.store.tensors import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class StoredStates:
    """States of one hook point as they are stored. values: [n, H] in the stored dtype. scale: fp32 [n] where the dtype
    is scaled."""

    values: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    def empty(cls, count: int, width: int, dtype: Dtype) -> "StoredStates":
        """Of ``count`` states, not initialised."""
        bits = np.empty((count, width), dtype.container)  # numpy asks for huge pages, where torch does not
        return cls.of(bits, np.empty(count, np.float32) if dtype.scaled else None, dtype)

    @classmethod
    def of(cls, bits_nH: NDArray[Any], scale_n: NDArray[np.float32] | None, dtype: Dtype) -> "StoredStates":
        """In the memory of arrays, of which the first is in ``dtype.container``."""
        values = torch.from_numpy(bits_nH).view(TORCH_DTYPES[dtype.name])
        return cls(values=values, scale=None if scale_n is None else torch.from_numpy(scale_n))

    def __getitem__(self, places: slice) -> "StoredStates":
        """Some of the states, in the same memory."""
        return StoredStates(values=self.values[places], scale=None if self.scale is None else self.scale[places])

    def put(self, places: torch.Tensor, states: "StoredStates") -> None:
        """Sets the states at ``places``, int64 [m], to other ones, [m]."""
        self.values[places] = states.values
        if self.scale is not None:
            assert states.scale is not None
            self.scale[places] = states.scale

    def decoded(self) -> torch.Tensor:
        """[n, H]: as they were stored, or float32 where the dtype is scaled."""
        return self.values if self.scale is None else self.values * self.scale[:, None]


class Locator:
    """Says in which shard states lie, and where there."""

    def __init__(self, manifest: Manifest) -> None:
        filled = [(number, part) for number, part in enumerate(manifest.parts) if part.states]
        self._first_states = np.array([manifest.first_states[number] for number, _ in filled], np.int64)
        self._shard_rows = np.array([part.shard_rows for _, part in filled], np.int64)
        self._first_shards = np.array([manifest.grid.of_part(number).start for number, _ in filled], np.int64)

    def find(self, states: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards and places in them, both [n], of ``states``, [n]."""
        if len(self._first_states) == 1:  # dividing by one number is much faster than by many
            return states // self._shard_rows[0], states % self._shard_rows[0]
        parts = np.searchsorted(self._first_states, states, side="right") - 1
        shards, inside = np.divmod(states - self._first_states[parts], self._shard_rows[parts])
        return shards + self._first_shards[parts], inside


class ShardReader(Protocol):
    """Gets states out of the shards of one store; a shard is opened and checked at first use. ``points`` are numbers of
    hook points in the order of the manifest; results are in the order of ``points``. Safe to call from threads.

    Raises:
        StoreError: a shard is missing or is not what the manifest says; names the file.
    """

    def consecutive(self, points: Sequence[int], first_state: int, count: int) -> list[StoredStates]:
        """States ``first_state`` to ``first_state + count`` of the store."""
        ...

    def scattered(self, points: Sequence[int], states: NDArray[np.int64]) -> list[StoredStates]:
        """``states`` of the store, [n], in that order."""
        ...

    def sums(self, point: int, shards: range) -> Iterator[Sums]:
        """The arrays beside the values, for each of some shards."""
        ...


def check_shard(manifest: Manifest, point: int, shard: int, header: Header, file: str) -> None:
    """Whether ``header`` is that of the shard that the manifest lists there: no other one, none of another store.

    Raises:
        StoreError: it is not; names ``file``.
    """
    entry = manifest.hook_points[point]
    listed = entry.shards[shard]
    assert listed is not None, "a manifest that from_json has passed lists every shard"
    _, expected = header_of((entry.point, shard), manifest)
    wanted = {"bytes": listed.bytes, "tensors": _layout(expected), **expected.metadata, "norm": entry.norm}
    found = {"bytes": header.size_bytes, "tensors": _layout(header), **header.metadata}
    for label, value in wanted.items():
        if found.get(label) != value:
            raise StoreError(file, f"must have {label} {value}, as the manifest says", found.get(label))
    start = header.offsets[str(entry.point)]
    if start % manifest.dtype.bytes:
        raise StoreError(file, f"must have its values at a multiple of {manifest.dtype.bytes} bytes", start)


def _layout(header: Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (spec.dtype, spec.shape) for name, spec in header.tensors.items()}
