"""Whether a shard is the one that the manifest lists: its header, and what follows from its values.

Legend: n states of a block, H numbers in each.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.store.entries import HookPointEntry, ShardEntry
from nemo_qwen_hidden.store.format import Dtype, shard_name
from nemo_qwen_hidden.store.header import ALIGNMENT_BYTES, Header, read_header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import DIVISOR, MOMENTS, NORMS, SCALE, header_of
from nemo_qwen_hidden.store.statistics import (
    BINS,
    LIMIT,
    Accumulator,
    ShardStatistics,
    Sums,
    bins_of,
    decode,
)
from nemo_qwen_hidden.store.upkeep.checked import BLOCK_BYTES, CheckedFile, digest_problem

NORM_TOLERANCE = 1e-12  # relative: another processor may add up squares in another order
_EXACT = ("rows", "nan", "inf", "max_abs", "max_abs_row")
_ROUNDED = ("min_norm", "max_norm")


def shard_problems(file: CheckedFile, manifest: Manifest, point: int, shard: int, *, full: bool) -> Iterator[str]:
    """What is wrong with one shard, in words.

    Args:
        point: number of the hook point. full: read all of it.

    Raises:
        StoreError: the file holds no safetensors, or becomes shorter while it is read.
    """
    entry = manifest.hook_points[point]
    listed = entry.shards[shard]
    assert listed is not None, "a manifest that from_json has passed lists every shard"
    header = read_header(file.descriptor, file.name)
    wrong = [*_name_problems(entry, listed, shard), *_header_problems(header, manifest, entry, shard)]
    wrong += _error_problems(listed, manifest.dtype)
    if not full or wrong:
        yield from wrong
        return
    values = _Values(file, header, entry, manifest.dtype)
    statistics, sums = values.accumulate()
    digest = digest_problem(file, listed.sha256)
    if digest is not None:  # of which the rest follows
        yield digest
        return
    yield from values.problems
    yield from _statistics_problems(listed.statistics, statistics)
    stored = Sums(
        moments=file.at(header.offsets[MOMENTS], sums.moments.nbytes).view("<i8").reshape(sums.moments.shape),
        norms=file.at(header.offsets[NORMS], sums.norms.nbytes).view("<i4"),
    )
    if not np.array_equal(stored.moments, sums.moments):
        yield f"{MOMENTS} must be what its values give"
    if not np.array_equal(stored.norms, sums.norms) and not values.norms_fit(stored.norms):
        yield f"{NORMS} must be what its values give"


def _name_problems(entry: HookPointEntry, listed: ShardEntry, shard: int) -> Iterator[str]:
    name = f"{entry.point}/{shard_name(shard)}"
    if listed.file != name:
        yield f"must be named {name}"


def _header_problems(header: Header, manifest: Manifest, entry: HookPointEntry, shard: int) -> Iterator[str]:
    """Against the header that this shard of this store has; what metadata says beyond it is left alone."""
    _, expected = header_of((entry.point, shard), manifest)
    if list(header.tensors.items()) != list(expected.tensors.items()):
        yield f"must hold {_layout(expected)}, as the manifest says, but holds {_layout(header)}"
        return
    for label, value in {**expected.metadata, "norm": entry.norm}.items():
        found = header.metadata.get(label)
        if found != value:
            yield f"must have {label} {value!r}, as the manifest says, but has {found!r}"
    start = header.offsets[str(entry.point)]
    if start % ALIGNMENT_BYTES:
        yield f"must have its values at a multiple of {ALIGNMENT_BYTES} bytes, but has them at {start}"


def _layout(header: Header) -> str:
    return ", ".join(f"{name} {spec.dtype} {list(spec.shape)}" for name, spec in header.tensors.items())


def _error_problems(listed: ShardEntry, dtype: Dtype) -> Iterator[str]:
    """What it cost to store the values cannot be computed from them; that it was a sum over all rows can."""
    error = listed.error
    if error is None:
        return
    if dtype.name == "fp32":
        yield "must say of no error, since fp32 holds every value"
    elif error.rows != listed.rows:
        yield f"must say of the error of all {listed.rows} rows, but says that of {error.rows}"
    elif error.rms > error.max * (1 + 1e-6):
        yield f"must have an error of at most {error.max} in the mean, as its largest is, but has {error.rms}"


def _statistics_problems(listed: ShardStatistics, found: ShardStatistics) -> Iterator[str]:
    for name in (*_EXACT, *_ROUNDED):
        claimed, computed = getattr(listed, name), getattr(found, name)
        tolerance = NORM_TOLERANCE * computed if name in _ROUNDED else 0
        if abs(claimed - computed) > tolerance:
            yield f"statistics.{name} must be {computed}, as its values say, but is {claimed} in the manifest"


class _Values:
    """The values of a shard, block by block."""

    def __init__(self, file: CheckedFile, header: Header, entry: HookPointEntry, dtype: Dtype) -> None:
        self._file, self._dtype, self._width, name = file, dtype, entry.width, str(entry.point)
        self._start, self._rows = header.offsets[name], header.tensors[name].shape[0]
        self._row_bytes = self._width * dtype.bytes
        self._block_rows = max(1, BLOCK_BYTES // self._row_bytes)
        scaled = self._dtype.scaled
        self._scale_n = file.at(header.offsets[SCALE], 4 * self._rows).view("<f4") if scaled else None
        divided = DIVISOR in header.offsets
        self._divisor_n = file.at(header.offsets[DIVISOR], 4 * self._rows).view("<f4") if divided else None
        self.problems: list[str] = []

    def accumulate(self) -> tuple[ShardStatistics, Sums]:
        """Reads all values, for the file's hash too; what is wrong with them is in ``problems``."""
        if self._scale_n is not None and not (np.isfinite(self._scale_n) & (self._scale_n >= 0)).all():
            self.problems.append(f"{SCALE} must be finite and at least 0 in every row")
        if self._divisor_n is not None and not (np.isfinite(self._divisor_n) & (self._divisor_n > 0)).all():
            self.problems.append(f"{DIVISOR} must be finite and above 0 in every row")
        accumulator, below = Accumulator(self._width), False
        self._file.pass_over(self._start)
        for row in range(0, self._rows, self._block_rows):
            stored_nH = self._shaped(self._file.take(self._size(row)))
            below = below or (self._dtype.scaled and bool((stored_nH == -128).any()))
            accumulator.add(self._decoded(stored_nH, row))
        if below:
            self.problems.append("must hold numbers from -127 to 127")
        return accumulator.result()

    def norms_fit(self, stored: NDArray[np.int32]) -> bool:
        """Whether counts of norms are right but for norms within ``NORM_TOLERANCE`` of a bound between bins."""
        most, least = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        for row in range(0, self._rows, self._block_rows):
            block = self._file.at(self._start + row * self._row_bytes, self._size(row))
            values_nH = self._decoded(self._shaped(block), row).astype(np.float64)
            counted_nH = values_nH[(np.abs(values_nH) < LIMIT).all(axis=1)]
            norms = np.sqrt((counted_nH * counted_nH).sum(axis=1))
            most += np.bincount(bins_of(norms * (1 - NORM_TOLERANCE)), minlength=BINS)
            least += np.bincount(bins_of(norms * (1 + NORM_TOLERANCE)), minlength=BINS)
        reached = np.cumsum(stored, dtype=np.int64)
        fits = (stored >= 0).all() and (np.cumsum(least) <= reached).all() and (reached <= np.cumsum(most)).all()
        return bool(fits)

    def _size(self, row: int) -> int:
        return min(self._block_rows, self._rows - row) * self._row_bytes

    def _shaped(self, block: NDArray[np.uint8]) -> NDArray[np.generic]:
        return block.view(self._dtype.container).reshape(-1, self._width)

    def _decoded(self, stored_nH: NDArray[np.generic], row: int) -> NDArray[np.float32]:
        scale = None if self._scale_n is None else self._scale_n[row : row + len(stored_nH)]
        with np.errstate(all="ignore"):  # whatever the bytes are, they are numbers
            return decode(stored_nH, self._dtype, scale)
