"""Rows as they lie in shards, and what gets them from there. Legend: n rows asked for, H hidden."""

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
class StoredRows:
    """Rows of one hook point as they are stored. values: [n, H] in the stored dtype. scale: fp32 [n] where the dtype
    is scaled."""

    values: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    def empty(cls, count: int, hidden_size: int, dtype: Dtype) -> "StoredRows":
        """Of ``count`` rows, not initialised."""
        bits = np.empty((count, hidden_size), dtype.container)  # numpy asks for huge pages, where torch does not
        return cls.of(bits, np.empty(count, np.float32) if dtype.scaled else None, dtype)

    @classmethod
    def of(cls, bits_nH: NDArray[Any], scale_n: NDArray[np.float32] | None, dtype: Dtype) -> "StoredRows":
        """In the memory of arrays, of which the first is in ``dtype.container``."""
        values = torch.from_numpy(bits_nH).view(TORCH_DTYPES[dtype.name])
        return cls(values=values, scale=None if scale_n is None else torch.from_numpy(scale_n))

    def __getitem__(self, rows: slice) -> "StoredRows":
        """Some of the rows, in the same memory."""
        return StoredRows(values=self.values[rows], scale=None if self.scale is None else self.scale[rows])

    def put(self, places: torch.Tensor, rows: "StoredRows") -> None:
        """Sets the rows at ``places``, int64 [m], to other ones, [m]."""
        self.values[places] = rows.values
        if self.scale is not None:
            assert rows.scale is not None
            self.scale[places] = rows.scale

    def decoded(self) -> torch.Tensor:
        """[n, H]: as they were stored, or float32 where the dtype is scaled."""
        return self.values if self.scale is None else self.values * self.scale[:, None]


class Locator:
    """Says in which shard rows lie, and where there."""

    def __init__(self, manifest: Manifest) -> None:
        filled = [(number, part) for number, part in enumerate(manifest.parts) if part.rows]
        self._first_rows = np.array([part.first_row for _, part in filled], np.int64)
        self._shard_rows = np.array([part.shard_rows for _, part in filled], np.int64)
        self._first_shards = np.array([manifest.grid.of_part(number).start for number, _ in filled], np.int64)

    def find(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards and places in them, both [n], of ``rows``, [n]."""
        if len(self._first_rows) == 1:  # dividing by one number is much faster than by many
            return rows // self._shard_rows[0], rows % self._shard_rows[0]
        parts = np.searchsorted(self._first_rows, rows, side="right") - 1
        shards, inside = np.divmod(rows - self._first_rows[parts], self._shard_rows[parts])
        return shards + self._first_shards[parts], inside


class ShardReader(Protocol):
    """Gets rows out of the shards of one store; a shard is opened and checked at first use. ``points`` are numbers of
    hook points in the order of the manifest; results are in the order of ``points``. Safe to call from threads.

    Raises:
        StoreError: a shard is missing or is not what the manifest says; names the file.
    """

    def consecutive(self, points: Sequence[int], first_row: int, count: int) -> list[StoredRows]:
        """Rows ``first_row`` to ``first_row + count`` of the store."""
        ...

    def scattered(self, points: Sequence[int], rows: NDArray[np.int64]) -> list[StoredRows]:
        """``rows`` of the store, [n], in that order."""
        ...

    def sums(self, point: int) -> Iterator[Sums]:
        """The arrays beside the values, for each shard."""
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
