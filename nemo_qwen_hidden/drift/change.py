"""How far the states of one step are from those of another, at one hook point.

Legend: X states of the reference, Y of the step, [K, H] each; n states of a block. Sums are taken in float64. Memory is
that of a block, of a few numbers for each state, and of three bands of an H x H matrix (``BAND_BYTES``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.drift.probe_set import ProbeSet

MAX_NORM = 10.0
"""A state is an outlier where its norm is above so many times the median."""

BAND_BYTES = 1 << 29
"""The most that products of states may take. Where three H x H matrices in float64 take more, which is the case above
H = 4,729, they are computed in bands of columns, and the states are read again for each."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Change:
    """The states of a step against those of a reference, of the same tokens.

    ``..._inliers`` leaves out outliers: states whose norm, at the step or at the reference, is above ``max_norm`` times
    the median norm of that step. NaN where nothing is defined: no states, norms of 0, states that are all equal.

    cosine: mean over states of x.y / (|x| |y|), states of norm 0 left out; cosine_p05, cosine_p50, cosine_p95: its
        quantiles.
    cka: linear CKA, ||Y'X||_F**2 / (||X'X||_F ||Y'Y||_F) of centred columns (Kornblith et al. 2019, section 3,
        https://arxiv.org/abs/1905.00414).
    change: ||Y - X||_F / ||X||_F.
    norm: mean L2 norm of the step's states.
    outliers: the part of the states that are. nonfinite: the number of states that hold NaN or an infinite value at
        the step or at the reference; they count in nothing else.
    """

    cosine: float
    cosine_p05: float
    cosine_p50: float
    cosine_p95: float
    cka: float
    cka_inliers: float
    change: float
    change_inliers: float
    norm: float
    norm_inliers: float
    outliers: float
    nonfinite: float


def change(
    probe: ProbeSet,
    hook_point: str,
    *,
    step: int,
    reference: int,
    max_norm: float = MAX_NORM,
    band_bytes: int = BAND_BYTES,
) -> Change:
    """Compares two steps at one hook point.

    Args:
        max_norm: see ``Change``. band_bytes: see ``BAND_BYTES``.

    Raises:
        StoreError: a step was not captured, or the two hold states of other tokens.
    """
    probe.check_alike(step, reference)
    pairs = _Pairs(probe=probe, hook_point=hook_point, step=step, reference=reference)
    every = np.arange(probe.size(step))
    scalars = [_scalars(x_nH, y_nH) for x_nH, y_nH in pairs.of(every)]
    x_norm, y_norm, product, distance = np.concatenate([np.zeros((4, 0)), *scalars], axis=1)
    finite = np.isfinite(x_norm) & np.isfinite(y_norm)
    outlier = finite & (_above(x_norm, finite, max_norm) | _above(y_norm, finite, max_norm))
    inlier = finite & ~outlier
    cka_inliers, cka = _cka(pairs, every[inlier], every[outlier], probe.width(hook_point), band_bytes)
    both = finite & (x_norm > 0) & (y_norm > 0)
    cosine = product[both] / x_norm[both] / y_norm[both]
    low, middle, high = np.quantile(cosine, (0.05, 0.5, 0.95)).tolist() if len(cosine) else [np.nan] * 3
    return Change(
        cosine=_mean(cosine),
        cosine_p05=low,
        cosine_p50=middle,
        cosine_p95=high,
        cka=cka,
        cka_inliers=cka_inliers,
        change=_relative(distance[finite], x_norm[finite]),
        change_inliers=_relative(distance[inlier], x_norm[inlier]),
        norm=_mean(y_norm[finite]),
        norm_inliers=_mean(y_norm[inlier]),
        outliers=_mean(outlier[finite].astype(np.float64)),
        nonfinite=float(np.count_nonzero(~finite)),
    )


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The states of two steps, block by block."""

    probe: ProbeSet
    hook_point: str
    step: int
    reference: int

    def of(self, states: NDArray[np.int64]) -> Iterator[tuple[_Floats, _Floats]]:
        """float64 [n, H] of the reference and of the step."""
        for block in self.probe.blocks(self.hook_point, states):
            x_nH, y_nH = (self.probe.values(step, self.hook_point, block) for step in (self.reference, self.step))
            yield x_nH.astype(np.float64), y_nH.astype(np.float64)


def _scalars(x_nH: _Floats, y_nH: _Floats) -> _Floats:
    """[4, n]: |x|, |y|, x.y and |y - x|**2. What is not finite is not finite in |x| or |y|."""
    with np.errstate(invalid="ignore"):  # inf - inf, 0 * inf
        return np.stack(
            [
                np.sqrt((x_nH * x_nH).sum(axis=1)),
                np.sqrt((y_nH * y_nH).sum(axis=1)),
                (x_nH * y_nH).sum(axis=1),
                ((y_nH - x_nH) ** 2).sum(axis=1),
            ]
        )


def _above(norm: _Floats, finite: NDArray[np.bool_], multiple: float) -> NDArray[np.bool_]:
    return norm > multiple * np.median(norm[finite]) if finite.any() else np.zeros(len(norm), np.bool_)


def _mean(values: _Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _relative(square_distance: _Floats, norm: _Floats) -> float:
    """||Y - X||_F / ||X||_F."""
    below = float((norm**2).sum())
    return float(np.sqrt(square_distance.sum() / below)) if below > 0 else float("nan")


def _cka(
    pairs: _Pairs, inliers: NDArray[np.int64], outliers: NDArray[np.int64], width: int, band_bytes: int
) -> tuple[float, float]:
    """Over inliers alone, and over all. Each state is read once for each band."""
    squares = np.zeros((2, 3))
    for band in _bands(width, band_bytes):
        products = _Products(width, band)
        for found, states in zip(squares, (inliers, outliers), strict=True):
            for x_nH, y_nH in pairs.of(states):
                products.add(x_nH, y_nH)
            found += products.squares()
    with np.errstate(invalid="ignore"):  # 0 / 0 where all states are equal
        cka = squares[:, 0] / np.sqrt(squares[:, 1] * squares[:, 2])
    return float(cka[0]), float(cka[1])


def _bands(width: int, band_bytes: int) -> list[slice]:
    size = max(1, band_bytes // (3 * width * 8))
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


class _Products:
    """Moments of X and Y, in one pass: sums, and the products of one band of columns with all columns."""

    def __init__(self, width: int, band: slice) -> None:
        self._band, self._count = band, 0
        self._sums = np.zeros((2, width))
        self._products = np.zeros((3, band.stop - band.start, width))  # Y'X, X'X, Y'Y

    def add(self, x_nH: _Floats, y_nH: _Floats) -> None:
        """The next states."""
        self._count += len(x_nH)
        self._sums += x_nH.sum(axis=0), y_nH.sum(axis=0)
        for product, left, right in zip(self._products, (y_nH, x_nH, y_nH), (x_nH, x_nH, y_nH), strict=True):
            product += left[:, self._band].T @ right

    def squares(self) -> _Floats:
        """[3]: the squared Frobenius norms of this band of Y'X, X'X and Y'Y, of centred columns."""
        if not self._count:
            return np.zeros(3)
        x_H, y_H = self._sums
        means = (np.outer(left[self._band], right) for left, right in ((y_H, x_H), (x_H, x_H), (y_H, y_H)))
        pairs = zip(self._products, means, strict=True)
        return np.array([((product - mean / self._count) ** 2).sum() for product, mean in pairs])
