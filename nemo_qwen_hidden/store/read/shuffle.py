"""Which members of a data set lie in which batch: a seeded order over all of them, cut into batches, dealt to ranks.

Integers in, integers out. The order takes no memory, however many members there are.
"""

import hashlib
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError

REMAINDERS = ("keep", "drop", "repeat")
_ROUNDS = 8


class Permutation:
    """A seeded permutation of 0 to ``count``: ``permutation[numbers]`` says where each goes.

    A Feistel network over the smallest power of two that holds ``count``, and the cycle walked on until it comes back
    below ``count``: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002). Its round function mixes, and is
    no cipher.
    """

    def __init__(self, count: int, *, seed: int, epoch: int = 0) -> None:
        self._count = count
        bits = max(2, (count - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low, self._high = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
        digest = hashlib.shake_256(f"{count} {seed} {epoch}".encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, "<u8")

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n], from numbers of 0 to ``count``."""
        found = self._once(numbers.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self._count)).size:
            found[outside] = self._once(found[outside])
        return found.astype(np.int64)

    def _once(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = numbers >> self._low_bits, numbers & self._low
        for first, second in self._keys.reshape(-1, 2):  # each half in turn changed by the other: undone the same way
            high ^= _mixed(low + first) & self._high
            low ^= _mixed(high + second) & self._low
        return (high << self._low_bits) | low


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class Deal:
    """``count`` members in an order of each epoch's own, cut into batches of ``size``, of which rank ``rank`` of
    ``world`` gets every ``world``-th.

    seed: of the order; None for the members' own order. remainder: what becomes of members that do not fill a batch
    for every rank. ``keep``: every member once; the last batch is shorter, and some ranks get one batch more.
    ``drop``: they are left out, others in each epoch. ``repeat``: the first ones of the epoch fill up.

    Raises:
        StoreError: a number out of its range; names it.
    """

    count: int
    size: int
    seed: int | None = 0
    rank: int = 0
    world: int = 1
    remainder: str = "keep"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise StoreError("batch size", "must be at least 1", self.size)
        if not 0 <= self.rank < self.world:
            raise StoreError("rank", f"must be from 0 to {self.world - 1}, with a world of {self.world}", self.rank)
        if self.remainder not in REMAINDERS:
            raise StoreError("remainder", f"must be one of {', '.join(REMAINDERS)}", self.remainder)

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        whole = self.size * self.world
        if self.remainder == "drop":
            return self.count // whole
        if self.remainder == "repeat":
            return -(-self.count // whole)
        return max(0, -(-(-(-self.count // self.size) - self.rank) // self.world))

    def as_dict(self) -> dict[str, int | str | None]:
        """What all ranks have in common, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "rank"}

    def members(self, index: int) -> NDArray[np.int64]:
        """The members of batch ``index`` of this rank, counted on over epochs: the first of epoch e is batch e times
        ``len``. IndexError where there is none."""
        if index < 0 or not len(self):
            raise IndexError(f"batch {index} is not one of {len(self)} an epoch")
        epoch, batch = divmod(index, len(self))
        first = (batch * self.world + self.rank) * self.size
        places = np.arange(first, first + self.size, dtype=np.int64)
        places = places % self.count if self.remainder == "repeat" else places[places < self.count]
        return places if self.seed is None else Permutation(self.count, seed=self.seed, epoch=epoch)[places]
