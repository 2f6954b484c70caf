"""Columns of several parts as one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.store.read.rows import Rows, resolve
from nemo_qwen_hidden.store.read.source import Column


class JoinedColumn:
    """Columns one after the other, each opened when its rows are asked for. Takes every index that a view takes.

    Args:
        columns: give the column of each part. starts: the first row of each part, then the number of rows.
        added: to the numbers of each part.
    """

    def __init__(
        self,
        columns: Sequence[Callable[[], Column]],
        starts: Sequence[int],
        *,
        added: Sequence[int] = (),
        dtype: np.dtype[Any],
    ) -> None:
        self._columns, self._starts = columns, np.array(starts, np.int64)
        self._added = added or [0] * len(columns)
        self.dtype, self.ndim = dtype, 1

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: Rows, /) -> Any:
        chosen = resolve(rows, len(self))
        if isinstance(chosen, int):
            part = self._parts_of(np.array([chosen]))[0]
            return self._of_part(part, chosen - int(self._starts[part]))
        if isinstance(chosen, range) and chosen.step == 1:
            return self._consecutive(chosen.start, chosen.stop)
        return self._scattered(np.asarray(chosen, np.int64))

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("the columns of several parts cannot be one array without a copy")
        return self._consecutive(0, len(self)).astype(dtype or self.dtype, copy=False)

    def _parts_of(self, rows: NDArray[np.int64]) -> NDArray[np.intp]:
        """The part of each row; empty parts share their start with the next, and are passed over."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _of_part(self, part: int, rows: Any) -> Any:
        return np.asarray(self._columns[part]()[rows]).astype(self.dtype)[()] + self.dtype.type(self._added[part])

    def _consecutive(self, start: int, stop: int) -> NDArray[Any]:
        pieces = [np.zeros(0, self.dtype)]
        for part, first in enumerate(self._starts[:-1].tolist()):
            inside = slice(max(start - first, 0), min(stop, int(self._starts[part + 1])) - first)
            if inside.start < inside.stop:
                pieces.append(self._of_part(part, inside))
        return np.concatenate(pieces)

    def _scattered(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        found = np.empty(len(rows), self.dtype)
        parts = self._parts_of(rows)
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            found[places] = self._of_part(part, rows[places] - self._starts[part])
        return found
