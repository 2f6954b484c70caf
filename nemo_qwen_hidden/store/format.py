"""What a store looks like on disk: names, dtypes, and which rows lie in which shard.

    STORE/manifest.json                    written last; its presence makes the folder a store
    STORE/unfinished.json                  there while a store is being made
    STORE/tokens/000000.safetensors        token table: what each row is
    STORE/tokens/000000.documents.jsonl    one line a document
    STORE/resid_post@12/000000.safetensors shard: rows [k * shard_rows, (k + 1) * shard_rows) of one hook point

Everything is little-endian, as safetensors is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FORMAT = "nemo_qwen_hidden.store"
FORMAT_VERSION = 1
VERSIONS_READ = (1,)

MANIFEST = "manifest.json"
MARKER = "unfinished.json"
TOKENS = "tokens"
TEMPORARY = ".tmp"
PARTIAL = ".partial"

SHARD_FILES = re.compile(r"[0-9]{6,}\.safetensors(\.partial)?")
TOKEN_FILES = re.compile(r"[0-9]{6,}\.((safetensors|documents\.jsonl)(\.tmp)?|[a-z_]+\.tmp)")
HOOK_POINT_NAME = re.compile(r"(?P<site>[a-z_]+)(?:@(?P<layer>0|[1-9][0-9]*))?")


@dataclass(frozen=True, kw_only=True)
class Dtype:
    """A dtype that states can be stored in.

    name: as in the settings (``fp32``). safetensors: as in a header (``F32``). bytes: of one number. container: the
    numpy dtype that holds the same bits, an integer where numpy has no such float.
    """

    name: str
    safetensors: str
    bytes: int
    container: np.dtype[np.generic]


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype(name="fp32", safetensors="F32", bytes=4, container=np.dtype("<f4")),
        Dtype(name="bf16", safetensors="BF16", bytes=2, container=np.dtype("<i2")),
        Dtype(name="fp16", safetensors="F16", bytes=2, container=np.dtype("<f2")),
    )
}


def shard_name(shard: int) -> str:
    """File name of shard number ``shard``, e.g. ``000012.safetensors``."""
    return f"{shard:06d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class ShardGrid:
    """``rows`` rows cut into shards of ``shard_rows``; the last one may be shorter."""

    rows: int
    shard_rows: int

    def __post_init__(self) -> None:
        if self.rows < 0 or self.shard_rows < 1:
            raise ValueError(f"{self.rows} rows cannot be cut into shards of {self.shard_rows}")

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows of one shard."""
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard {shard} is not one of {self.shards}")
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def shard_of(self, row: int) -> int:
        """The shard that holds ``row``."""
        if not 0 <= row < self.rows:
            raise ValueError(f"row {row} is not one of {self.rows}")
        return row // self.shard_rows

    def pieces(self, first_row: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Consecutive rows cut at shard boundaries, in order: shard, first row, number of rows."""
        row, stop = first_row, first_row + length
        while row < stop:
            shard = self.shard_of(row)
            size = min(stop, self.rows_of(shard).stop) - row
            yield shard, row, size
            row += size


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
