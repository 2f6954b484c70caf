"""Statistics of stored values that merge exactly: the same numbers come out however the rows are cut into shards.

Moments are sums in fixed point, each value rounded by itself to ``2**-40``, so that adding them is exact in any order.
Norms are counted in bins of fixed bounds. What is only a maximum or a count merges by itself.

Legend: n rows of an array of states, H numbers in each, U = 2**40 (``UNITS``).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.store.fields import Fields
from nemo_qwen_hidden.store.format import Dtype, Shard

BLOCK_ROWS = 128  # at most; small enough for a processor's cache
BLOCK_NUMBERS = 1 << 16  # about as many, where a row is wide
UNIT_BITS = 40
LIMIT = 2.0**22  # of magnitudes: below it every sum over BLOCK_ROWS stays below 2**53, where float64 is exact
ERROR_BITS = 50

_TO_UNITS = 1.5 * 2.0**12  # added to a number below _SPLIT it rounds to 1/U: the sum's last bit is worth that
_SPLIT = 2.0**11
_TO_SPLITS = 1.5 * 2.0**63  # the same for multiples of _SPLIT
_BITS = int(np.float64(_TO_UNITS).view(np.uint64))

OCTAVES = range(-12, 30)
BINS_AN_OCTAVE = 128
BINS = len(OCTAVES) * BINS_AN_OCTAVE


@dataclass(frozen=True, kw_only=True)
class ShardStatistics:
    """What the manifest says of the values of a shard; the arrays beside them are ``Sums``.

    rows: that are counted in everything but ``nan`` and ``inf``: all of whose values are finite and below ``LIMIT``
    in magnitude. nan, inf: numbers of values. max_abs: the largest magnitude, found in row ``max_abs_row`` of the
    shard. min_norm, max_norm: of the L2 norms of rows. All 0 where no row is counted.
    """

    rows: int
    nan: int
    inf: int
    max_abs: float
    max_abs_row: int
    min_norm: float
    max_norm: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Fields) -> "ShardStatistics":
        return cls(
            rows=fields.integer("rows"),
            nan=fields.integer("nan"),
            inf=fields.integer("inf"),
            max_abs=fields.number("max_abs"),
            max_abs_row=fields.integer("max_abs_row"),
            min_norm=fields.number("min_norm"),
            max_norm=fields.number("max_norm"),
            extra=fields.rest(),
        )

    def as_dict(self) -> dict[str, Any]:
        known = {name: value for name, value in vars(self).items() if name != "extra"}
        return {**known, **self.extra}


@dataclass(frozen=True, kw_only=True)
class StoredError:
    """What storing cost: of each row the relative error e = |stored - computed| / |computed|, by L2 norms, 0 where the
    row is 0. units: sum of e**2 over ``rows`` in units of 2**-50, each rounded down by itself. max: the largest e."""

    rows: int
    units: int
    max: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rms(self) -> float:
        """Root of the mean of e**2."""
        return math.sqrt(self.units / 2**ERROR_BITS / self.rows) if self.rows else 0.0

    def __add__(self, other: "StoredError") -> "StoredError":
        return StoredError(
            rows=self.rows + other.rows, units=self.units + other.units, max=max(self.max, other.max), extra=self.extra
        )

    @classmethod
    def of(cls, relative: NDArray[np.float64]) -> "StoredError":
        """The errors of rows whose relative errors are ``relative``, [n]."""
        units = np.floor(relative**2 * float(2**ERROR_BITS))
        return cls(rows=len(relative), units=sum(map(int, units)), max=float(relative.max(initial=0.0)))

    @classmethod
    def parse(cls, fields: Fields) -> "StoredError":
        return cls(
            rows=fields.integer("rows"),
            units=fields.integer("squares_2e-50"),
            max=fields.number("max"),
            extra=fields.rest(),
        )

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "squares_2e-50": self.units, "max": self.max, **self.extra}


def add_error(errors: dict[Shard, StoredError], shard: Shard, error: StoredError) -> None:
    """Counts what storing some rows of a shard cost."""
    errors[shard] = errors[shard] + error if shard in errors else error


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Arrays beside the values of a shard.

    moments: int64 [4, H], over the counted rows: whole parts and fractions of the sum of values, whole parts and
    fractions of the sum of squares; fractions in 1/U, from 0 to U. norms: int32 [BINS], counts of rows by L2 norm.
    """

    moments: NDArray[np.int64]
    norms: NDArray[np.int32]


class Accumulator:
    """Takes the values of a shard in order and gives their statistics. Works in memory of its own, which stays in a
    processor's cache: allocating an array for each step took twice the time."""

    def __init__(self, width: int) -> None:
        self._moments = np.zeros((4, width), np.int64)
        self._norms: list[NDArray[np.float64]] = []  # of each row that is counted
        self._row = self._nan = self._inf = self._max_abs_row = 0
        self._max_abs = -1.0
        self._block_rows = max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // width))
        self._memory = np.empty((3, self._block_rows, width), np.float64)

    def add(self, values_nH: NDArray[np.float32] | NDArray[np.float64]) -> None:
        """The next rows."""
        for start in range(0, len(values_nH), self._block_rows):
            self._add(values_nH[start : start + self._block_rows])

    def _add(self, block_nH: NDArray[Any]) -> None:
        values_nH, squares_nH, spare_nH = (memory[: len(block_nH)] for memory in self._memory)
        np.copyto(values_nH, block_nH)
        np.multiply(values_nH, values_nH, out=squares_nH)
        magnitudes = np.sqrt(squares_nH.max(axis=1))  # the root of a square is the number; NaN where the row has one
        counted = magnitudes < LIMIT
        if not counted.all():
            strange = block_nH[~counted]
            self._nan += int(np.isnan(strange).sum())
            self._inf += int(np.isinf(strange).sum())
            values_nH, squares_nH, spare_nH = values_nH[counted], squares_nH[counted], spare_nH[counted]
            magnitudes = np.where(counted, magnitudes, -1.0)
        largest = int(magnitudes.argmax())
        most = float(magnitudes[largest])
        if most > self._max_abs:
            self._max_abs, self._max_abs_row = most, self._row + largest
        self._row += len(block_nH)
        self._norms.append(np.sqrt(squares_nH.sum(axis=1)))
        _add_fixed(self._moments[:2], values_nH, spare_nH, most)
        _add_fixed(self._moments[2:], squares_nH, spare_nH, most**2)

    def result(self) -> tuple[ShardStatistics, Sums]:
        """The statistics of all rows so far."""
        moments, norms = self._moments.copy(), np.concatenate([np.empty(0), *self._norms])
        for whole, fraction in (moments[:2], moments[2:]):
            whole += fraction >> UNIT_BITS
            fraction &= 2**UNIT_BITS - 1
        statistics = ShardStatistics(
            rows=len(norms),
            nan=self._nan,
            inf=self._inf,
            max_abs=max(0.0, self._max_abs),
            max_abs_row=self._max_abs_row,
            min_norm=float(norms.min()) if len(norms) else 0.0,
            max_norm=float(norms.max(initial=0.0)),
        )
        return statistics, Sums(moments=moments, norms=np.bincount(bins_of(norms), minlength=BINS).astype(np.int32))


def _add_fixed(
    sums_2H: NDArray[np.int64], values_nH: NDArray[np.float64], spare_nH: NDArray[np.float64], most: float
) -> None:
    """Adds whole parts and fractions of each column, and leaves neither array as it was. most: the largest magnitude.
    Every step is exact but the rounding to 1/U, half to even."""
    if most >= _SPLIT:  # multiples of that first, which leaves at most half of it
        np.add(values_nH, _TO_SPLITS, out=spare_nH)
        spare_nH -= _TO_SPLITS
        values_nH -= spare_nH
        sums_2H[0] += spare_nH.sum(axis=0).astype(np.int64)
    np.add(values_nH, _TO_UNITS, out=spare_nH)
    # the bits of such a float64 count units, as an integer that is _BITS for 0; modulo 2**64 any sum of them is exact
    total = spare_nH.view(np.uint64).sum(axis=0) - np.uint64(len(spare_nH) * _BITS % 2**64)
    units = total.view(np.int64)
    sums_2H[0] += units >> UNIT_BITS
    sums_2H[1] += units & (2**UNIT_BITS - 1)


def bins_of(norms: NDArray[np.float64]) -> NDArray[np.intp]:
    """[n], the bin of each norm: octaves of two, each cut into ``BINS_AN_OCTAVE`` equal bins; what lies outside of
    ``OCTAVES`` is in the first or last bin."""
    mantissa, exponent = np.frexp(norms)  # mantissa from 0.5 to 1
    inside = ((2 * mantissa - 1) * BINS_AN_OCTAVE).astype(np.intp)
    bins = (exponent - 1 - OCTAVES.start) * BINS_AN_OCTAVE + inside
    return np.clip(np.where(mantissa == 0, 0, bins), 0, BINS - 1)


def bin_bounds(number: int) -> tuple[float, float]:
    """The norms at which a bin begins and ends."""
    octave, inside = divmod(number, BINS_AN_OCTAVE)
    size = math.ldexp(1.0, OCTAVES.start + octave)
    return size * (1 + inside / BINS_AN_OCTAVE), size * (1 + (inside + 1) / BINS_AN_OCTAVE)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of one hook point over states of a store.

    rows: counted states (see ``ShardStatistics``); left_out: the others. mean, variance: float64 [H], over states, of
    the stored values rounded to 2**-40; variance divides by ``rows``. max_abs_state: the number of a state.
    """

    rows: int
    left_out: int
    nan: int
    inf: int
    max_abs: float
    max_abs_state: int
    min_norm: float
    max_norm: float
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    norms: NDArray[np.int64]

    @property
    def mean_square(self) -> float:
        """Mean of the squares of all values."""
        return float((self.variance + self.mean**2).mean()) if self.rows else 0.0

    def norm_quantile(self, q: float) -> float:
        """The L2 norm that a part ``q`` (0 to 1) of the rows stays below, within 0.4 % between ``2**-12`` and
        ``2**30``; exact at 0 and 1.

        Raises:
            ValueError: q is not within 0 and 1, or no row is counted.
        """
        if not 0 <= q <= 1 or not self.rows:
            raise ValueError(f"no quantile {q} of {self.rows} rows: q goes from 0 to 1")
        if q in (0, 1):
            return self.max_norm if q else self.min_norm
        number = int(np.searchsorted(np.cumsum(self.norms), q * self.rows))
        return min(max(sum(bin_bounds(number)) / 2, self.min_norm), self.max_norm)


def merge(shards: Iterable[tuple[int, int, ShardStatistics, Sums]], width: int) -> Statistics:
    """The statistics of all states of some shards, of which each is: first state, states, what is known of it."""
    rows = total = nan = inf = max_abs_state = 0
    max_abs, min_norm, max_norm = -1.0, math.inf, 0.0
    moments, norms = np.zeros((4, width), object), np.zeros(BINS, np.int64)
    for first_state, size, known, sums in shards:
        total += size
        nan, inf = nan + known.nan, inf + known.inf
        if not known.rows:
            continue
        rows += known.rows
        if known.max_abs > max_abs:
            max_abs, max_abs_state = known.max_abs, first_state + known.max_abs_row
        min_norm, max_norm = min(min_norm, known.min_norm), max(max_norm, known.max_norm)
        moments += sums.moments
        norms += sums.norms
    mean, variance = _mean_and_variance(moments, rows) if rows else (np.zeros(width), np.zeros(width))
    return Statistics(
        rows=rows,
        left_out=total - rows,
        nan=nan,
        inf=inf,
        max_abs=max(0.0, max_abs),
        max_abs_state=max_abs_state,
        min_norm=min_norm if rows else 0.0,
        max_norm=max_norm,
        mean=mean,
        variance=variance,
        norms=norms,
    )


def _mean_and_variance(moments: NDArray[Any], rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In integers up to the last step, which Python rounds correctly: no cancellation, no order of additions."""
    units = 2**UNIT_BITS
    mean, variance = [], []
    for whole, fraction, square_whole, square_fraction in moments.T.tolist():
        total = whole * units + fraction
        squares = square_whole * units + square_fraction
        mean.append(total / (rows * units))
        # rounding each square by itself can leave less than nothing
        variance.append(max(0, rows * squares * units - total * total) / (rows * rows * units * units))
    return np.array(mean), np.array(variance)


def decode(stored_nH: NDArray[Any], dtype: Dtype, scale_n: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """[n, H] of what is stored, from an array in ``dtype.container``; float32 holds every value of every dtype."""
    if dtype.name == "bf16":
        return (stored_nH.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if scale_n is not None:
        return stored_nH.astype(np.float32) * scale_n[:, None]
    return stored_nH.astype(np.float32, copy=False)
