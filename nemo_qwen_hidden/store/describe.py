"""What is in a store, for people and for programs. Nothing is printed here."""

from dataclasses import asdict, dataclass
from typing import Any

from nemo_qwen_hidden.store.format import human_bytes
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


def describe(store: Store) -> list[tuple[str, str]]:
    """Label and value of everything but the hook points, one line each; nested provenance as ``model.path``."""
    manifest = store.manifest
    facts = [
        ("path", str(store.path)),
        ("rows", f"{store.rows:,}"),
        ("documents", f"{store.documents:,}"),
        ("hidden size", f"{store.hidden_size:,}"),
        ("hook points", f"{len(manifest.hook_points)}"),
        ("dtype", f"{manifest.stored_dtype} stored, {manifest.compute_dtype} computed"),
        ("shards", f"{manifest.grid.shards:,} a hook point, {manifest.shard_rows:,} rows each"),
        ("size", human_bytes(total_bytes(store))),
    ]
    for section in ("model", "tokenizer", "data", "producer"):
        facts += _flat(section, getattr(manifest, section))
    return facts


def as_dict(store: Store) -> dict[str, Any]:
    """The same for programs: JSON values, sizes in bytes."""
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


def _flat(label: str, value: object) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [fact for name, nested in value.items() for fact in _flat(f"{label}.{name}", nested)]
    return [(label, "-" if value is None else str(value))]
