"""Which tokens are kept, document by document: the same however documents are batched, split over files or laid out.

A filter looks at one document alone, and what all of them agree on is kept. Sampling orders tokens by ``random_keys``
and takes the first so many, of a document or of the whole data set; the latter in one pass over what is kept, for a
threshold, and one that applies it. All positions count from the beginning of a document, whatever windows it is run in.
"""

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.config import TokenSettings

Positions = NDArray[np.int64]

_GAMMA = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def filters_nothing(tokens: TokenSettings) -> bool:
    """Whether the filters alone, before any sampling, keep every token of every document."""
    return tokens.keep == "all" and tokens.every == 1 and tokens.special and tokens.first


def keeps_everything(tokens: TokenSettings) -> bool:
    """Whether every row is stored as it is."""
    unsampled = tokens.sample is None and tokens.max_norm is None
    return filters_nothing(tokens) and unsampled and tokens.pool == "none"


def kept_of(
    tokens: TokenSettings,
    length: int,
    *,
    document: int,
    mask: NDArray[np.bool_] | None = None,
    special: NDArray[np.bool_] | None = None,
) -> Positions:
    """Positions, ascending, that are kept of a document of ``length`` tokens: what the filters leave, then the draw
    from each document, then ``pool=last``. Where ``samples_all`` these are the ones to draw from, for ``RowSample``,
    and ``pooled_last`` comes after it.

    Args:
        document: integer from 0 to 2**64 - 1 that stands for the document; with the seed, it decides what is drawn.
        mask, special: as in ``filtered``.
    """
    positions = filtered(tokens, length, mask=mask, special=special)
    if samples_all(tokens):
        return positions
    return pooled_last(tokens, sampled(tokens, positions, document=document))


def samples_all(tokens: TokenSettings) -> bool:
    """Whether tokens are drawn of the whole data set, for which all of it has to be seen first."""
    return tokens.sample is not None and tokens.sample_of == "all"


def filtered(
    tokens: TokenSettings,
    length: int,
    *,
    mask: NDArray[np.bool_] | None = None,
    special: NDArray[np.bool_] | None = None,
) -> Positions:
    """Positions, ascending, of a document of ``length`` tokens that every filter keeps.

    Args:
        mask: bool [length], what ``keep=mask`` and ``keep=assistant`` keep; needed there alone.
        special: bool [length], the special tokens; needed where they are not kept.

    Raises:
        ValueError: a mask that is needed is not given, or not of this length.
    """
    kept = _kept_by_choice(tokens, length, mask)
    kept &= np.arange(length) % tokens.every == 0
    if not tokens.special:
        kept &= ~_of_length(special, length, "special")
    if not tokens.first:
        kept[:1] = False
    return np.flatnonzero(kept).astype(np.int64, copy=False)


def _kept_by_choice(tokens: TokenSettings, length: int, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    if tokens.keep in ("mask", "assistant"):
        return _of_length(mask, length, "mask").copy()
    kept = np.full(length, tokens.keep == "all")
    if tokens.keep == "last":
        kept[-1:] = True
    elif tokens.keep == "spans":
        for span in tokens.slices:
            kept[span] = True
    return kept


def _of_length(mask: NDArray[np.bool_] | None, length: int, name: str) -> NDArray[np.bool_]:
    if mask is None or mask.shape != (length,) or mask.dtype != np.bool_:
        held = "nothing" if mask is None else f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"`{name}` must be bool [{length}] for these settings, but is {held} instead.")
    return mask


def sampled(tokens: TokenSettings, positions: Positions, *, document: int) -> Positions:
    """What the draw from each document leaves of its kept ``positions``: at most ``tokens.sample``, ascending."""
    if tokens.sample is None or samples_all(tokens) or len(positions) <= tokens.sample:
        return positions
    keys = random_keys(random_key(tokens.seed, document), positions)
    return np.sort(positions[np.argpartition(keys, tokens.sample - 1)[: tokens.sample]])


def pooled_last(tokens: TokenSettings, positions: Positions) -> Positions:
    """The last of a document's kept positions, where ``pool=last`` asks for it alone; else all of them."""
    return positions[-1:] if tokens.pool == "last" else positions


class RowSample:
    """Draws ``size`` rows of a whole data set. Holds keys, 8 bytes each, of at most twice as many rows and ``spare``,
    beside those of the block that was offered last.

    A row is drawn if its key is among the ``size`` smallest of all rows that were offered. No two rows have the same
    key, so that exactly ``min(size, offered)`` are.
    """

    def __init__(self, size: int, seed: int, *, spare: int = 65536) -> None:
        self._size, self._state, self._most = size, random_key(seed, 0), 2 * size + spare
        self._offered = 0
        self._keys = array("Q")
        self._highest: np.uint64 | None = None

    def offer(self, rows: Positions) -> None:
        """Adds rows that are kept so far; each row once, in any order and blocks."""
        self._highest = None
        self._offered += len(rows)
        self._keys.frombytes(random_keys(self._state, rows).tobytes())
        if len(self._keys) > self._most:
            self._keys = array("Q", self._smallest().tobytes())

    def drawn(self, rows: Positions) -> NDArray[np.bool_]:
        """bool [rows]: which of ``rows`` are drawn, once all have been offered."""
        if self._offered <= self._size:
            return np.ones(len(rows), np.bool_)
        if self._highest is None:
            self._highest = self._smallest().max()
        return random_keys(self._state, rows) <= self._highest

    def _smallest(self) -> NDArray[np.uint64]:
        keys: NDArray[np.uint64] = np.partition(np.frombuffer(self._keys, np.uint64), self._size - 1)[: self._size]
        return keys


def random_key(seed: int, number: int) -> int:
    """One key for the two of them, from 0 to 2**64 - 1: output ``number`` of splitmix64 begun at ``seed``."""
    return _mix((seed + (number + 1) * _GAMMA) & _MASK64)


def random_keys(state: int, numbers: Positions) -> NDArray[np.uint64]:
    """uint64 [n]: for each number k, output k of splitmix64 begun at ``state``; another key for every other number.

    Integer arithmetic modulo 2**64 alone, so the same on every machine and in every release: Steele, Lea and Flood,
    Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; https://prng.di.unimi.it/splitmix64.c.
    """
    z = np.uint64(state) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def ranges_of(rows: Positions) -> Iterable[tuple[int, int]]:
    """Ascending rows as ranges for a ``RowSet``: first row and number of rows of each."""
    if not len(rows):
        return ()
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    firsts = rows[np.concatenate([[0], cuts])]
    lengths = np.diff(np.concatenate([[0], cuts, [len(rows)]]))
    return zip(firsts.tolist(), lengths.tolist(), strict=True)
