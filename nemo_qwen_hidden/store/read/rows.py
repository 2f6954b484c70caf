"""What may stand in ``view[states]`` and ``column[rows]``, as numbers."""

import operator
import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Several: TypeAlias = Union[slice, range, list[int], list[bool], NDArray[Any], "torch.Tensor"]
Rows: TypeAlias = int | Several

_ACCEPTED = (
    "an int, a slice, a range, a list of ints, or a one-dimensional integer or boolean numpy array or torch tensor"
)


def resolve(rows: Rows, count: int, what: str = "row") -> int | range | NDArray[np.int64]:
    """``rows`` of ``count``, none negative: one, equally spaced ones, or [n] any. what: they are, in errors.

    Raises:
        IndexError: one that is not there, or a mask of another length than ``count``.
        TypeError: none of the accepted kinds.
    """
    if isinstance(rows, slice):
        return range(*rows.indices(count))
    if isinstance(rows, range):
        if len(rows):
            _check(min(rows[0], rows[-1]), max(rows[0], rows[-1]), count, what)
        return rows if not len(rows) or min(rows[0], rows[-1]) >= 0 else _positive(np.array(rows), count)
    if _is_tensor(rows):
        if rows.is_floating_point() or rows.is_complex():  # bfloat16 has no numpy form to be refused in
            raise _other(f"{rows.dtype} {list(rows.shape)}", what)
        rows = rows.detach().cpu().numpy()
    if isinstance(rows, list):
        rows = np.asarray(rows) if rows else np.zeros(0, np.int64)
    if isinstance(rows, np.ndarray):
        if rows.ndim == 0 and rows.dtype.kind in "iu":
            return _one(int(rows), count, what)
        if rows.ndim == 1 and rows.dtype.kind in "iub":
            return _many(rows, count, what)
        raise _other(f"{rows.dtype} {list(rows.shape)}", what)
    if isinstance(rows, (bool, np.bool_)) or not hasattr(rows, "__index__"):
        raise _other(type(rows).__name__, what)
    return _one(operator.index(rows), count, what)


def _is_tensor(rows: object) -> TypeGuard["torch.Tensor"]:
    """Whether it is one of torch's, which who only reads a token table need not have loaded."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(rows, torch.Tensor)


def _other(given: str, what: str) -> TypeError:
    return TypeError(f"{what}s must be {_ACCEPTED}, but are {given} instead")


def _one(row: int, count: int, what: str) -> int:
    _check(row, row, count, what)
    return row % count


def _many(rows: NDArray[Any], count: int, what: str) -> NDArray[np.int64]:
    if rows.dtype.kind == "b":
        if len(rows) != count:
            raise IndexError(f"a mask of {len(rows)} does not fit {count} {what}s")
        return np.flatnonzero(rows)
    if len(rows):  # before the cast, which turns large unsigned numbers into negative ones
        _check(int(rows.min()), int(rows.max()), count, what)
    return _positive(rows.astype(np.int64), count)


def _positive(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.where(rows < 0, rows + count, rows)


def _check(lowest: int, highest: int, count: int, what: str) -> None:
    wrong = highest if highest >= count else lowest
    if not -count <= wrong < count:
        raise IndexError(f"{what} {wrong} is not one of {count}")
