"""Sets of rows as ranges: what is done, what is missing."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Ranges = Iterable[tuple[int, int]]
"""(first row, number of rows) of each range."""


class RowSet:
    """A set of rows, held as sorted ranges that neither overlap nor touch. Immutable; ``len`` counts rows."""

    def __init__(self, ranges: Ranges = ()) -> None:
        pairs = np.array([(first, first + length) for first, length in ranges if length], np.int64).reshape(-1, 2)
        self._starts, self._stops = _joined(pairs[:, 0], pairs[:, 1])

    @classmethod
    def _of(cls, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> "RowSet":
        made = cls()
        made._starts, made._stops = starts, stops
        return made

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(first row, number of rows) of each range, in order."""
        return list(zip(self._starts.tolist(), (self._stops - self._starts).tolist(), strict=True))

    def __len__(self) -> int:
        return int((self._stops - self._starts).sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowSet) and self.ranges == other.ranges

    __hash__ = None  # type: ignore[assignment]  # compared by value, and as large as the corpus

    def __or__(self, other: "RowSet") -> "RowSet":
        starts = np.concatenate([self._starts, other._starts])
        return RowSet._of(*_joined(starts, np.concatenate([self._stops, other._stops])))

    def __sub__(self, other: "RowSet") -> "RowSet":
        if not len(self._starts) or not len(other._starts):
            return self
        low, high = int(self._starts[0]), int(self._stops[-1])
        return self & other.complement(low, high)

    def __and__(self, other: "RowSet") -> "RowSet":
        """Of two sorted lists of disjoint ranges, each range meets a run of consecutive ones of the other list."""
        first = np.searchsorted(other._stops, self._starts, side="right")
        last = np.searchsorted(other._starts, self._stops, side="left")
        counts = np.maximum(last - first, 0)
        mine = np.repeat(np.arange(len(counts)), counts)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        theirs = np.repeat(first, counts) + offsets
        starts = np.maximum(self._starts[mine], other._starts[theirs])
        return RowSet._of(starts, np.minimum(self._stops[mine], other._stops[theirs]))

    def complement(self, start: int, stop: int) -> "RowSet":
        """The rows from ``start`` to ``stop`` that are not in the set."""
        inner_starts = np.concatenate([np.array([start], np.int64), self._stops])
        inner_stops = np.concatenate([self._starts, np.array([stop], np.int64)])
        starts, stops = np.clip(inner_starts, start, stop), np.clip(inner_stops, start, stop)
        kept = starts < stops
        return RowSet._of(starts[kept], stops[kept])

    def within(self, first_row: int, length: int) -> Iterator[tuple[int, int]]:
        """The ranges of the set that lie in consecutive rows, cut at their ends: first row and number of rows."""
        index = int(np.searchsorted(self._stops, first_row, side="right"))
        while length and index < len(self._starts) and self._starts[index] < first_row + length:
            start = max(first_row, int(self._starts[index]))
            yield start, min(first_row + length, int(self._stops[index])) - start
            index += 1

    def meets(self, first_row: int, length: int) -> bool:
        """Whether any of these consecutive rows is in the set."""
        return next(self.within(first_row, length), None) is not None

    def __repr__(self) -> str:
        return f"RowSet({len(self)} rows in {len(self._starts)} ranges)"


def union(sets: Iterable[RowSet]) -> RowSet:
    """The rows that are in any of ``sets``."""
    listed = list(sets)
    if not listed:
        return RowSet()
    starts = np.concatenate([each._starts for each in listed])
    return RowSet._of(*_joined(starts, np.concatenate([each._stops for each in listed])))


def _joined(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted, and those that overlap or touch made one."""
    if not len(starts):
        return starts, stops
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(stops[order])
    first = np.concatenate([[True], starts[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return starts[first], reach[last]
