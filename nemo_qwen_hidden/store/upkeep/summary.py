"""What ``inspect`` says of the values in a store beyond its manifest: it reads arrays beside the values of shards."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.store.read.describe import as_dict
from nemo_qwen_hidden.store.read.reader import Store
from nemo_qwen_hidden.store.upkeep.verify import unfinished_job


@dataclass(frozen=True, kw_only=True)
class ValueLine:
    """Of one hook point. The fields are ``--json``'s names.

    rms: root of the mean of the squares of all values. median_norm: of the L2 norms of rows, within 0.4 %; None where
    no row is counted. rows_left_out: rows that the statistics leave out, since not all of their values are finite and
    below 2**22 in magnitude.
    """

    name: str
    rms: float
    median_norm: float | None
    rows_left_out: int


def value_lines(store: Store, names: Iterable[str]) -> tuple[ValueLine, ...]:
    """The lines of some hook points, by name.

    Raises:
        StoreError: a shard is missing or is not what the manifest says; names the file.
    """
    return tuple(_line(store, name) for name in names)


def everything(store: Store) -> dict[str, Any]:
    """All that can be said of a store without its values, as JSON values; sizes in bytes.

    Raises:
        StoreError: as ``value_lines``.
    """
    described = as_dict(store)
    known = {line.name: asdict(line) for line in value_lines(store, store.hook_points)}
    points = [{**point, **known[point["name"]]} for point in described["hook_points"]]
    return {**described, "hook_points": points, "files": files(store), "unfinished": unfinished(store)}


def files(store: Store) -> int:
    """How many files the manifest lists, each with its size and SHA-256."""
    return sum(1 for _ in store.manifest.files())


def unfinished(store: Store) -> str | None:
    """What a job that has not ended is making of the store, in words; not known of one on another file system."""
    return unfinished_job(store.path) if isinstance(store.path, Path) else None


def _line(store: Store, name: str) -> ValueLine:
    known = store.statistics(name)
    return ValueLine(
        name=name,
        rms=math.sqrt(known.mean_square),
        median_norm=known.norm_quantile(0.5) if known.rows else None,
        rows_left_out=known.left_out,
    )
