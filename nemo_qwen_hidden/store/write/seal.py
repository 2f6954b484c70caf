"""Turns a shard whose states are all there into a finished one: statistics, checksum, its final name.

Everything that is added follows from the shard's own bytes, so it does not matter which rank does it, or how often.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import CoverageError
from nemo_qwen_hidden.store.entries import ShardEntry
from nemo_qwen_hidden.store.files import naming_store, read_exactly, sync_folder, write_all
from nemo_qwen_hidden.store.format import PARTIAL, Shard, shard_name
from nemo_qwen_hidden.store.header import Header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import MOMENTS, SCALE, header_of
from nemo_qwen_hidden.store.statistics import Accumulator, StoredError, decode

_BLOCK_BYTES = 1 << 22


def seal(folder: Path, target: Manifest, shard: Shard, error: StoredError | None) -> ShardEntry:
    """Finishes one shard of the store in ``folder``; returns when it is durable under its final name.

    Args:
        error: what storing its rows cost.

    Raises:
        CoverageError: the file is not what this package has written.
        StoreError: no space is left.
    """
    point, number = shard
    rows, dtype, width = target.grid.states_of(number), target.dtype, target.entry(point).width
    start, header = header_of(shard, target)
    final = folder / str(point) / shard_name(number)
    partial = final.with_name(final.name + PARTIAL)
    with naming_store(folder, str(point)), open(partial, "r+b") as file:
        descriptor = file.fileno()
        if file.read(len(start)) != start or os.fstat(descriptor).st_size != header.size_bytes:
            raise CoverageError(f"{partial} was changed by something else while it was written")
        digest, accumulator = hashlib.sha256(start), Accumulator(width)
        scale_n = _scale(descriptor, header, len(rows)) if dtype.scaled else None
        row_size = width * dtype.bytes
        block_rows = max(1, _BLOCK_BYTES // row_size)
        for row in range(0, len(rows), block_rows):
            count = min(block_rows, len(rows) - row)
            block = read_exactly(descriptor, header.offsets[str(point)] + row * row_size, count * row_size)
            digest.update(block)
            stored_nH = np.frombuffer(block, dtype.container).reshape(count, -1)
            accumulator.add(decode(stored_nH, dtype, None if scale_n is None else scale_n[row : row + count]))
        statistics, sums = accumulator.result()
        values_end = header.offsets[str(point)] + len(rows) * row_size
        of_each_row = read_exactly(descriptor, values_end, header.offsets[MOMENTS] - values_end)
        tail = sums.moments.tobytes() + sums.norms.tobytes()
        digest.update(of_each_row + tail)
        write_all(descriptor, tail, header.offsets[MOMENTS])
        os.fsync(descriptor)
    os.rename(partial, final)
    sync_folder(final.parent)
    return ShardEntry(
        file=f"{point}/{final.name}",
        first_row=rows.start,
        rows=len(rows),
        bytes=header.size_bytes,
        sha256=digest.hexdigest(),
        statistics=statistics,
        error=error,
    )


def _scale(descriptor: int, header: Header, rows: int) -> NDArray[np.float32]:
    return np.frombuffer(read_exactly(descriptor, header.offsets[SCALE], 4 * rows), "<f4")
