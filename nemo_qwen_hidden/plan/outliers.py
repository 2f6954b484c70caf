"""Rows whose norm is far above those before them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.config import TokenSettings
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import (
    EMBED,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    RESIDUAL_SITES,
    HookPoint,
    expand,
)

DROPPED_BITS = 12
"""Low bits of a float32 norm that its median does without: 11 of 23 bits after the point remain, below 0.05 %."""

_STREAM = (EMBED, RESID_PRE, RESID_MID, RESID_POST)
_SPAN_BITS = 9
_BINS = 1 << (31 - DROPPED_BITS)
_INFINITE = 0x7F800000


class NormOutliers:
    """Marks each row whose norm is above ``multiple`` times the median of the norms of all rows before it.

    Row by row in the order of rows, so that the marks do not depend on how rows come in blocks. Every row counts in the
    median once it was judged, outliers too: what is marked is then a function of the norms alone, and no early mistake
    can shut out all that follows, while a median stands up to outliers as long as they are fewer than half. The first
    row, with nothing before it, is never one. Of an even number of norms, the median is the lower of the middle two.

    For the median norms are rounded down, towards zero, by clearing the ``DROPPED_BITS`` low bits of their float32; the
    norm that is compared with it is not. So the state is 2**19 counts, whatever the number of rows, and a row costs
    about a microsecond. An infinite norm is above every finite median, and NaN counts as infinite.
    """

    def __init__(self, multiple: float) -> None:
        self._multiple = multiple
        # Lists: single items are read and written a few times for each row, which numpy does ten times slower.
        self._counts = [0] * _BINS
        self._spans = [0] * (_BINS >> _SPAN_BITS)
        self._seen = 0
        self._median = 0  # bin of the median
        self._below = 0  # norms in lower bins

    def mark(self, norms: NDArray[np.float32]) -> NDArray[np.bool_]:
        """bool [rows]: which of the next rows, of these norms (float32 [rows]), are outliers."""
        norms = np.where(np.isnan(norms), np.float32(np.inf), np.abs(norms)).astype(np.float32)
        bins = norms.view(np.uint32) >> DROPPED_BITS
        medians = np.empty(len(norms), np.uint32)
        for row, found in enumerate(bins.tolist()):
            medians[row] = self._median if self._seen else _INFINITE >> DROPPED_BITS
            self._count(found)
        values = (medians << DROPPED_BITS).view(np.float32).astype(np.float64)
        marked: NDArray[np.bool_] = norms.astype(np.float64) > self._multiple * values
        return marked

    def _count(self, found: int) -> None:
        self._counts[found] += 1
        self._spans[found >> _SPAN_BITS] += 1
        if found < self._median:
            self._below += 1
        middle = self._seen // 2  # place of the median among the norms, with this one
        self._seen += 1
        while middle < self._below:
            self._step_down()
        while middle >= self._below + self._counts[self._median]:
            self._step_up()

    def _step_up(self) -> None:
        """To the next bin that holds a norm; spans that hold none are passed over."""
        self._below += self._counts[self._median]
        at = self._median + 1
        while not self._counts[at]:
            at += 1
            if not at & ((1 << _SPAN_BITS) - 1):
                span = at >> _SPAN_BITS
                while not self._spans[span]:
                    span += 1
                at = span << _SPAN_BITS
        self._median = at

    def _step_down(self) -> None:
        at = self._median - 1
        while not self._counts[at]:
            if not at & ((1 << _SPAN_BITS) - 1):
                span = (at >> _SPAN_BITS) - 1
                while not self._spans[span]:
                    span -= 1
                at = (span + 1) << _SPAN_BITS
            at -= 1
        self._median = at
        self._below -= self._counts[at]


def norm_point(tokens: TokenSettings, points: Sequence[HookPoint], *, num_layers: int) -> HookPoint:
    """The hook point whose norms decide, one of ``points``, which are ordered by depth.

    Raises:
        ConfigError: ``tokens.max_norm_at`` is not one of them, or none of them is of the residual stream.
    """
    if tokens.max_norm_at is None:
        stream = [point for point in points if point.site in _STREAM]
        if not stream:
            names = [str(point) for point in points]
            rule = "must hold a point of the residual stream, whose norms `tokens.max_norm` is a multiple of"
            raise ConfigError("capture.hook_points", rule, names)
        return stream[-1]
    asked = expand(tokens.max_norm_at, num_layers=num_layers, setting="tokens.max_norm_at")
    if len(asked) != 1 or asked[0] not in points or asked[0].site not in RESIDUAL_SITES:
        rule = f"must be one of `capture.hook_points`, at one of the sites {', '.join(RESIDUAL_SITES)}"
        raise ConfigError("tokens.max_norm_at", rule, tokens.max_norm_at)
    return asked[0]
