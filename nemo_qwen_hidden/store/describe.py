"""What is in a store, as values. Nothing is printed here."""

from dataclasses import asdict, dataclass
from typing import Any

from nemo_qwen_hidden.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class HookPointLine:
    """One line of the table of hook points; bytes: of all its shards. The fields are ``--json``'s names."""

    name: str
    layer: int | None
    huggingface_index: int | None
    norm: str
    meaning: str
    shards: int
    bytes: int


def hook_point_lines(store: Store) -> tuple[HookPointLine, ...]:
    """The table of hook points, in order of depth."""
    return tuple(
        HookPointLine(
            name=str(entry.point),
            layer=entry.point.layer,
            huggingface_index=entry.huggingface_index,
            norm=entry.norm,
            meaning=entry.meaning,
            shards=len(entry.shards),
            bytes=sum(shard.bytes for shard in entry.shards),
        )
        for entry in store.manifest.hook_points
    )


def as_dict(store: Store) -> dict[str, Any]:
    """Everything that a store says of itself, as JSON values; sizes in bytes."""
    manifest = store.manifest
    return {
        "path": str(store.path),
        "rows": store.rows,
        "documents": store.documents,
        "hidden_size": store.hidden_size,
        "shard_rows": manifest.shard_rows,
        "shards": manifest.grid.shards,
        "bytes": total_bytes(store),
        "dtypes": {"compute": manifest.compute_dtype, "stored": manifest.stored_dtype},
        "hook_points": [asdict(line) for line in hook_point_lines(store)],
        "model": dict(manifest.model),
        "tokenizer": dict(manifest.tokenizer),
        "data": dict(manifest.data),
        "producer": dict(manifest.producer),
    }


def total_bytes(store: Store) -> int:
    """Bytes of shards and token table, as the manifest lists them."""
    shards = sum(line.bytes for line in hook_point_lines(store))
    return shards + sum(part.bytes for part in store.manifest.tokens)
