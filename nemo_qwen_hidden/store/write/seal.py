"""Turns a shard whose states are all there into a finished one: statistics and checksum, then its final name.

Everything that is added follows from the shard's own bytes, so it does not matter who does it, or how often. Between
``measure`` and ``publish`` the shard's file has to be made durable.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import CoverageError
from nemo_qwen_hidden.store.entries import ShardEntry
from nemo_qwen_hidden.store.files import naming_store, read_exactly, read_into, sync_folder, write_all
from nemo_qwen_hidden.store.format import PARTIAL, Shard, shard_name
from nemo_qwen_hidden.store.header import Header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import MOMENTS, SCALE, header_of
from nemo_qwen_hidden.store.statistics import Accumulator, StoredError, decode

_BLOCK_BYTES = 1 << 18  # is hashed and decoded while it is in a processor's cache


def partial_path(folder: Path, shard: Shard) -> Path:
    """Where a shard lies until it is published."""
    return folder / str(shard[0]) / (shard_name(shard[1]) + PARTIAL)


def measure(folder: Path, target: Manifest, shard: Shard, error: StoredError | None, *, durable: bool) -> ShardEntry:
    """Reads a shard of the store in ``folder`` back once, and writes its statistics behind its states.

    Args:
        error: what storing its rows cost. durable: whether to return only when the whole file is.

    Raises:
        CoverageError: the file is not what this package has written.
        StoreError: no space is left.
    """
    point, number = shard
    rows, dtype, width = target.grid.states_of(number), target.dtype, target.entry(point).width
    start, header = header_of(shard, target)
    partial = partial_path(folder, shard)
    with naming_store(folder, str(point)), open(partial, "r+b", buffering=0) as file:
        descriptor = file.fileno()
        if file.read(len(start)) != start or os.fstat(descriptor).st_size != header.size_bytes:
            raise CoverageError(f"{partial} was changed by something else while it was written")
        digest, accumulator = hashlib.sha256(start), Accumulator(width)
        scale_n = _scale(descriptor, header, len(rows)) if dtype.scaled else None
        row_size = width * dtype.bytes
        block_rows = max(1, _BLOCK_BYTES // row_size)
        memory = memoryview(bytearray(block_rows * row_size))
        for row in range(0, len(rows), block_rows):
            count = min(block_rows, len(rows) - row)
            block = memory[: count * row_size]
            read_into(descriptor, block, header.offsets[str(point)] + row * row_size)
            digest.update(block)
            stored_nH = np.frombuffer(block, dtype.container).reshape(count, -1)
            accumulator.add(decode(stored_nH, dtype, None if scale_n is None else scale_n[row : row + count]))
        statistics, sums = accumulator.result()
        values_end = header.offsets[str(point)] + len(rows) * row_size
        of_each_row = read_exactly(descriptor, values_end, header.offsets[MOMENTS] - values_end)
        tail = sums.moments.tobytes() + sums.norms.tobytes()
        digest.update(of_each_row + tail)
        write_all(descriptor, tail, header.offsets[MOMENTS])
        if durable:
            os.fsync(descriptor)
    return ShardEntry(
        file=f"{point}/{shard_name(number)}",
        first_row=rows.start,
        rows=len(rows),
        bytes=header.size_bytes,
        sha256=digest.hexdigest(),
        statistics=statistics,
        error=error,
    )


def publish(folder: Path, shards: Iterable[Shard]) -> None:
    """Gives measured shards, whose bytes are durable, their final names; returns when those are durable."""
    points = set()
    for shard in shards:
        points.add(shard[0])
        with naming_store(folder, str(shard[0])):
            os.rename(partial_path(folder, shard), folder / str(shard[0]) / shard_name(shard[1]))
    for point in points:
        with naming_store(folder, str(point)):
            sync_folder(folder / str(point))


def _scale(descriptor: int, header: Header, rows: int) -> NDArray[np.float32]:
    return np.frombuffer(read_exactly(descriptor, header.offsets[SCALE], 4 * rows), "<f4")
