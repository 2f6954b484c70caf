"""What is in a store, as values. Nothing is printed here, and nothing but the manifest is read."""

from dataclasses import asdict, dataclass
from typing import Any

from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.read.reader import Store


@dataclass(frozen=True, kw_only=True)
class HookPointLine:
    """One line of the table of hook points. The fields are ``--json``'s names.

    bytes: of all its shards. nan, inf: numbers of values. max_abs, min_norm, max_norm: of the values, and of the L2
    norms of states, over those that the statistics count. error_rms, error_max: of the relative error by state that the
    stored dtype cost, None where it holds every value as it was. shape: of one state. heads: see ``HookPointEntry``.
    """

    name: str
    layer: int | None
    huggingface_index: int | None
    norm: str
    meaning: str
    shape: tuple[int, ...]
    heads: tuple[int, ...] | None
    shards: int
    bytes: int
    nan: int
    inf: int
    max_abs: float
    min_norm: float
    max_norm: float
    error_rms: float | None
    error_max: float | None


def hook_point_lines(store: Store) -> tuple[HookPointLine, ...]:
    """The table of hook points, in order of depth."""
    return tuple(_line(store, entry) for entry in store.manifest.hook_points)


def as_dict(store: Store) -> dict[str, Any]:
    """Everything that a store says of itself, as JSON values; sizes in bytes."""
    manifest = store.manifest
    return {
        "path": str(store.path),
        "rows": store.rows,
        "states": store.states,
        "pooling": manifest.pooling,
        "documents": store.documents,
        "hidden_size": store.hidden_size,
        "shards": manifest.grid.shards,
        "bytes": total_bytes(store),
        "dtypes": {"compute": manifest.compute_dtype, "stored": manifest.stored_dtype},
        "final_norm": manifest.final_norm is not None,
        "hook_points": [asdict(line) for line in hook_point_lines(store)],
        "parts": [
            {
                "rows": part.rows,
                "states": part.states,
                "documents": part.documents,
                "shard_rows": part.shard_rows,
                "selection": part.selection and dict(part.selection),
                "data": dict(part.data),
            }
            for part in manifest.parts
        ],
        "steps": [
            {
                "phase": entry.phase,
                "step": entry.step,
                "samples": [list(each) for each in entry.samples],
                "part": entry.part,
                "rows": len(entry.rows),
                "documents": len(entry.documents),
            }
            for entry in store.steps
        ],
        "model": dict(manifest.model),
        "tokenizer": dict(manifest.tokenizer),
        "producers": [dict(producer) for producer in manifest.producers],
    }


def total_bytes(store: Store) -> int:
    """Of all files that the manifest lists."""
    return sum(file.bytes for file in store.manifest.files())


def _line(store: Store, entry: HookPointEntry) -> HookPointLine:
    counted = [shard.statistics for shard in entry.present if shard.statistics.rows]
    error = store[entry.point].error()
    return HookPointLine(
        name=str(entry.point),
        layer=entry.point.layer,
        huggingface_index=entry.huggingface_index,
        norm=entry.norm,
        meaning=entry.meaning,
        shape=entry.shape,
        heads=entry.heads,
        shards=len(entry.shards),
        bytes=sum(shard.bytes for shard in entry.present),
        nan=sum(shard.statistics.nan for shard in entry.present),
        inf=sum(shard.statistics.inf for shard in entry.present),
        max_abs=max((known.max_abs for known in counted), default=0.0),
        min_norm=min((known.min_norm for known in counted), default=0.0),
        max_norm=max((known.max_norm for known in counted), default=0.0),
        error_rms=None if error is None else error.rms,
        error_max=None if error is None else error.max,
    )
