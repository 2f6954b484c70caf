"""What a store looks like on disk: names, dtypes, and which states lie in which shard. docs/format.md specifies it.

    STORE/manifest.json                    written last; its presence makes the folder a store
    STORE/unfinished.json                  there while a job works on the store
    STORE/journal/                         while a job works on the store: rows that are durable, shards that are
                                           done (*.jsonl), and locks of who works on it (*.lock)
    STORE/final_norm.safetensors           weight of the model's final norm
    STORE/tokens/000000.safetensors        token table of part 0: what each row is, and which rows have states
    STORE/tokens/000000.documents.jsonl    one line a document of part 0
    STORE/resid_post@12/000000.safetensors shard: some states of one hook point

Everything is little-endian, as safetensors is.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_qwen_hidden.hookpoint import HookPoint

Shard = tuple[HookPoint, int]
"""A hook point and the number of one of its shards."""

FORMAT = "nemo_qwen_hidden.store"
VERSIONS_READ = (1, 2)

MANIFEST = "manifest.json"
MARKER = "unfinished.json"
JOB_LOCK, RANKS_LOCK = "job.lock", "ranks.lock"
JOURNAL = "journal"
STAGED = "staged"  # folder in the journal: a token table that is not the store's yet
TOKENS = "tokens"
FINAL_NORM_FILE = "final_norm.safetensors"
TEMPORARY = ".tmp"
PARTIAL = ".partial"

SHARD_FILES = re.compile(r"[0-9]{6,}\.safetensors(\.partial)?")
TOKEN_FILES = re.compile(r"[0-9]{6,}\.((safetensors|documents\.jsonl)(\.tmp)?|[a-z_]+\.tmp)")
JOURNAL_FILES = re.compile(r"[0-9]+-[0-9a-f]+\.jsonl")
JOURNAL_FOLDER_FILES = re.compile(rf"{JOURNAL_FILES.pattern}(\.tmp)?|(job|ranks)\.lock")
HOOK_POINT_NAME = re.compile(r"(?P<site>[a-z_]+)(?:@(?P<layer>0|[1-9][0-9]*))?")


@dataclass(frozen=True, kw_only=True)
class Dtype:
    """A dtype that states can be stored in.

    name: as in the settings (``fp32``). safetensors: as in a header (``F32``). bytes: of one number. container: the
    numpy dtype that holds the same bits, an integer where numpy has no such float. scaled: whether each state has
    a scale beside it, by which its numbers are to be multiplied.
    """

    name: str
    safetensors: str
    bytes: int
    container: np.dtype[np.generic]
    scaled: bool = False


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype(name="fp32", safetensors="F32", bytes=4, container=np.dtype("<f4")),
        Dtype(name="bf16", safetensors="BF16", bytes=2, container=np.dtype("<i2")),
        Dtype(name="fp16", safetensors="F16", bytes=2, container=np.dtype("<f2")),
        Dtype(name="int8", safetensors="I8", bytes=1, container=np.dtype("i1"), scaled=True),
    )
}


def shard_name(shard: int) -> str:
    """File name of shard number ``shard``, e.g. ``000012.safetensors``."""
    return f"{shard:06d}.safetensors"


class ShardGrid:
    """Which states lie in which shard. Each part of a store is cut by itself into shards of a fixed number of states,
    of which the last may be shorter; shards are numbered through.

    Args:
        parts: states of each part, and states of a shard in it.
    """

    def __init__(self, parts: Iterable[tuple[int, int]]) -> None:
        self._starts = [0]
        self._first_shards = [0]
        for states, shard_rows in parts:
            if states < 0 or shard_rows < 1:
                raise ValueError(f"{states} states cannot be cut into shards of {shard_rows}")
            stop = self._starts[-1] + states
            self._starts += range(self._starts[-1] + shard_rows, stop, shard_rows)
            if states:
                self._starts.append(stop)
            self._first_shards.append(self.shards)

    @property
    def states(self) -> int:
        """How many states there are."""
        return self._starts[-1]

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self._starts) - 1

    @property
    def starts(self) -> Sequence[int]:
        """The first state of every shard, then the number of states."""
        return self._starts

    def of_part(self, part: int) -> range:
        """The shards of one part."""
        return range(self._first_shards[part], self._first_shards[part + 1])

    def part_of(self, shard: int) -> int:
        """The part that a shard belongs to."""
        return bisect_right(self._first_shards, shard) - 1

    def states_of(self, shard: int) -> range:
        """The states of one shard."""
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard {shard} is not one of {self.shards}")
        return range(self._starts[shard], self._starts[shard + 1])

    def shard_of(self, state: int) -> int:
        """The shard that holds ``state``."""
        if not 0 <= state < self.states:
            raise ValueError(f"state {state} is not one of {self.states}")
        return bisect_right(self._starts, state) - 1

    def pieces(self, first_state: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Consecutive states cut at shard boundaries, in order: shard, first state, number of states."""
        state, stop = first_state, first_state + length
        while state < stop:
            shard = self.shard_of(state)
            size = min(stop, self.states_of(shard).stop) - state
            yield shard, state, size
            state += size


def human_bytes(size: int) -> str:
    """A size for people, in powers of 1000: ``1.5 GB``."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} PB"
