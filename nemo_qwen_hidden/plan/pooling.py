"""One vector for a document: the weight of each of its kept tokens, and the row that the vector is stored at.

mean: v = 1/n * sum(h_p). weighted_mean: v = sum(w_p * h_p) with w_p = (p + 1) / sum(q + 1), p and all q kept positions
of the document, from 0. Of a whole document that is SGPT's position-weighted mean (Muennighoff,
https://arxiv.org/abs/2202.08904), which numbers tokens from 1. ``last`` needs no arithmetic: it keeps one row.
"""

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.config import MEANS
from nemo_qwen_hidden.errors import ConfigError


def weights(pool: str, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [n]: the weight of each kept position in the document's vector; their sum is 1, up to rounding.

    Args:
        pool: ``mean`` or ``weighted_mean``.
        positions: int64 [n], counted from the beginning of the document; those of all of its kept tokens.

    Raises:
        ValueError: no position, which gives no vector, or another way of pooling.
    """
    if pool not in MEANS or not len(positions):
        raise ValueError(f"`pool` must be one of {', '.join(MEANS)} over at least one position, but is {pool} instead.")
    parts = np.ones(len(positions)) if pool == "mean" else (positions + 1).astype(np.float64)
    parts /= parts.sum()
    return parts


def pooled_row(first_row: int, length: int) -> int:
    """The row that a mean over a document of ``length`` tokens is stored at: its last, whether that was kept or not."""
    return first_row + length - 1


def check_whole(pool: str, *, cut_documents: int, max_tokens: int) -> None:
    """A mean is taken where all tokens of a document are run together.

    Args:
        cut_documents: number of documents that are run as several windows.

    Raises:
        ConfigError: there are some, and their mean is asked for.
    """
    if pool in MEANS and cut_documents:
        cut = "1 document is" if cut_documents == 1 else f"{cut_documents:,} documents are"
        rule = (
            f"must be none or last where documents are cut into windows ({cut} longer than the {max_tokens:,} tokens "
            "of `data.max_tokens`)"
        )
        raise ConfigError("tokens.pool", rule, pool)
