"""Writes rows of hidden states to their places. Every rank has a writer of its own on the same folder.

A header depends on sizes alone, so a shard's length and the offset of each of its rows are known before any data:
whoever comes first makes the file, everyone writes where its rows belong, and nobody waits.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.files import naming_full_disk, write_all
from nemo_qwen_hidden.store.format import DTYPES, PARTIAL, ShardGrid, shard_name
from nemo_qwen_hidden.store.shard import shard_header
from nemo_qwen_hidden.store.tensors import first_not_finite, first_overflow, row_bytes, to_stored

Shard = tuple[HookPoint, int]  # and its number


class RowRun(Protocol):
    """Consecutive rows ``first_row`` to ``first_row + length``."""

    @property
    def first_row(self) -> int: ...

    @property
    def length(self) -> int: ...


class ShardWriter:
    """Writes rows of ``hook_points``, those that this rank can see, to shards under temporary names.

    Args:
        folder: the store's folder, begun by ``session.begin``.
        rows, hidden_size, dtype, shard_rows: of the whole store; the same on every rank. ``dtype`` is the stored
            one: ``fp32``, ``bf16`` or ``fp16``.
        max_open_files: shards kept open at once.

    A context manager: it closes, or only lets go of its files where the block raised.
    """

    def __init__(
        self,
        folder: Path,
        *,
        hook_points: Iterable[HookPoint],
        rows: int,
        hidden_size: int,
        dtype: str,
        shard_rows: int,
        max_open_files: int = 64,
    ) -> None:
        self._folder = folder
        self._points = frozenset(hook_points)
        self._grid = ShardGrid(rows=rows, shard_rows=shard_rows)
        self._hidden_size, self._dtype = hidden_size, DTYPES[dtype]
        self._max_open_files = max_open_files
        self._open: OrderedDict[Shard, int] = OrderedDict()  # descriptors, least recently used first
        self._offsets: dict[Shard, int] = {}  # byte of the first row, of each shard that we write to
        self._written: Counter[Shard] = Counter()
        self._closed = False
        for point in self._points:
            (folder / str(point)).mkdir(exist_ok=True)

    @property
    def written(self) -> dict[Shard, int]:
        """Rows written of each shard, by hook point and shard number; a row written twice counts twice."""
        return dict(self._written)

    def write(self, hook_point: HookPoint, runs: Sequence[RowRun], values_nH: torch.Tensor) -> None:
        """Writes the rows of ``runs``, which ``values_nH`` holds in that order.

        Args:
            values_nH: [n rows, H hidden], any float dtype, on the CPU; cast to the stored dtype here.

        Raises:
            StoreError: a value is not finite, or too large for the stored dtype (nothing of this call is written), or
                no space is left (what was written of this call is not counted in full).
            ValueError: rows outside the store, or values of another shape, device or kind than said above.
        """
        self._check(hook_point, runs, values_nH)
        if not len(values_nH):
            return
        broken = first_not_finite(values_nH)
        if broken is not None:
            where = f"{hook_point} has none in row {_row_at(runs, broken)}"
            rule = f"must give finite values; {where} (fp16 ends at 65504)"
            raise StoreError("precision.compute", rule, str(values_nH.dtype).removeprefix("torch."))
        stored = to_stored(values_nH, self._dtype)
        overflow = first_overflow(values_nH, stored)
        if overflow is not None:
            largest = float(values_nH[overflow].abs().nan_to_num(posinf=0.0).max())
            row = _row_at(runs, overflow)
            most = torch.finfo(stored.dtype).max
            rule = f"must hold every value, and at most {most:g} fits; {hook_point} has {largest:g} in row {row}"
            raise StoreError("precision.stored", rule, self._dtype.name)
        data, row_size = row_bytes(stored), self._hidden_size * self._dtype.bytes
        done = 0
        with naming_full_disk(self._folder, str(hook_point)):
            for first_row, length in _merged(runs):
                for number, row, size in self._grid.pieces(first_row, length):
                    self._put((hook_point, number), row, data[done * row_size : (done + size) * row_size])
                    self._written[hook_point, number] += size
                    done += size

    def close(self) -> None:
        """Returns when everything written is durable; a second call does nothing.

        Raises:
            StoreError: no space is left.
            OSError: whatever else the disk reports.
        """
        if self._closed:
            return
        try:
            for shard in self._offsets:
                with naming_full_disk(self._folder, str(shard[0])):
                    os.fsync(self._descriptor(shard))
        finally:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._let_go()

    def _check(self, point: HookPoint, runs: Sequence[RowRun], values_nH: torch.Tensor) -> None:
        if self._closed:
            raise ValueError("the writer is closed")
        if point not in self._points:
            raise ValueError(f"{point} is not one of the hook points that this writer was made for")
        if values_nH.device.type != "cpu" or not values_nH.dtype.is_floating_point:
            raise ValueError(f"values must be floats on the CPU, but are {values_nH.dtype} on {values_nH.device}")
        expected = (sum(run.length for run in runs), self._hidden_size)
        if tuple(values_nH.shape) != expected:
            raise ValueError(f"values of these runs must be {list(expected)}, but are {list(values_nH.shape)}")
        for run in runs:
            if run.length < 0 or not 0 <= run.first_row <= run.first_row + run.length <= self._grid.rows:
                raise ValueError(f"rows {run.first_row} + {run.length} do not lie within {self._grid.rows} rows")

    def _put(self, shard: Shard, row: int, data: memoryview) -> None:
        if shard not in self._offsets:
            self._offsets[shard] = self._make(shard)
        in_shard = row - shard[1] * self._grid.shard_rows
        offset = self._offsets[shard] + in_shard * self._hidden_size * self._dtype.bytes
        write_all(self._descriptor(shard), data, offset)

    def _make(self, shard: Shard) -> int:
        """Makes the file unless another rank has; returns the byte at which its data starts.

        Every rank writes the same header and sets the same length, so it does not matter who comes first.
        ``posix_fallocate`` would reserve the space too, but where the file system lacks it glibc writes zeros into
        blocks that look empty, and can so wipe out what another rank writes at that moment.
        """
        point, number = shard
        rows = self._grid.rows_of(number)
        start, header = shard_header(point, rows, hidden_size=self._hidden_size, dtype=self._dtype)
        descriptor = self._descriptor(shard, os.O_CREAT)
        os.ftruncate(descriptor, header.size_bytes)
        write_all(descriptor, start, 0)
        return len(start)

    def _descriptor(self, shard: Shard, create: int = 0) -> int:
        """An open descriptor of the shard. Closing one to make place does not sync: ``close`` opens it again, and
        the kernel reports a failed write-back to whoever syncs next."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self._max_open_files:
            os.close(self._open.popitem(last=False)[1])
        path = self._folder / str(shard[0]) / (shard_name(shard[1]) + PARTIAL)
        self._open[shard] = os.open(path, create | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        return self._open[shard]

    def _let_go(self) -> None:
        self._closed = True
        while self._open:
            os.close(self._open.popitem()[1])


def _merged(runs: Iterable[RowRun]) -> Iterator[tuple[int, int]]:
    """First row and length of runs, those that continue each other joined: fewer and larger writes."""
    first_row = length = 0
    for run in runs:
        if first_row + length == run.first_row:
            length += run.length
            continue
        if length:
            yield first_row, length
        first_row, length = run.first_row, run.length
    if length:
        yield first_row, length


def _row_at(runs: Iterable[RowRun], index: int) -> int:
    """The row of the value at ``index`` along the concatenated runs."""
    for run in runs:
        if index < run.length:
            return run.first_row + index
        index -= run.length
    raise IndexError(index)
