"""The record of what a store is. Unknown optional fields are kept; an unknown version is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_qwen_hidden.store.entries import HookPointEntry, TokenPart
from nemo_qwen_hidden.store.fields import Fields, load_json, to_json
from nemo_qwen_hidden.store.format import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    VERSIONS_READ,
    ShardGrid,
)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """rows, documents, hidden_size, shard_rows: sizes of the whole store. compute_dtype: what the model ran in, a
    name for people. stored_dtype: one of ``format.DTYPES``. model, tokenizer, data, producer: provenance, as the
    caller gives it (JSON values). extra: fields that this release does not know."""

    rows: int
    documents: int
    hidden_size: int
    shard_rows: int
    compute_dtype: str
    stored_dtype: str
    hook_points: tuple[HookPointEntry, ...]
    tokens: tuple[TokenPart, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    producer: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    dtypes_extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> ShardGrid:
        return ShardGrid(rows=self.rows, shard_rows=self.shard_rows)

    @classmethod
    def from_json(cls, text: bytes, file: str = MANIFEST) -> "Manifest":
        """The manifest in ``text``; ``file`` is its name in errors.

        Raises:
            StoreError: not a manifest of ours, of another version, or inconsistent; names file and field.
        """
        fields = Fields(load_json(text, file), file=file)
        fields.choice("format", (FORMAT,))
        version = fields.integer("version")
        if version not in VERSIONS_READ:
            known = ", ".join(str(number) for number in VERSIONS_READ)
            raise fields.error("version", f"must be one that this release of nemo_qwen_hidden reads ({known})", version)
        dtypes = fields.nested("dtypes")
        manifest = cls(
            rows=fields.integer("rows"),
            documents=fields.integer("documents"),
            hidden_size=fields.integer("hidden_size", minimum=1),
            shard_rows=fields.integer("shard_rows", minimum=1),
            compute_dtype=dtypes.text("compute"),
            stored_dtype=dtypes.choice("stored", tuple(DTYPES)),
            hook_points=tuple(HookPointEntry.parse(entry) for entry in fields.each("hook_points")),
            tokens=tuple(TokenPart.parse(part) for part in fields.each("tokens")),
            **{name: fields.mapping(name) for name in ("model", "tokenizer", "data", "producer")},
            extra=fields.rest(),
            dtypes_extra=dtypes.rest(),
        )
        manifest._check(fields)
        return manifest

    def to_json(self) -> bytes:
        """UTF-8, indented, one key order; what ``from_json`` reads."""
        entries = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "rows": self.rows,
            "documents": self.documents,
            "hidden_size": self.hidden_size,
            "shard_rows": self.shard_rows,
            "dtypes": {"compute": self.compute_dtype, "stored": self.stored_dtype, **self.dtypes_extra},
            "hook_points": [entry.as_dict() for entry in self.hook_points],
            "tokens": [part.as_dict() for part in self.tokens],
            "model": dict(self.model),
            "tokenizer": dict(self.tokenizer),
            "data": dict(self.data),
            "producer": dict(self.producer),
            **self.extra,
        }
        return to_json(entries)

    def _check(self, fields: Fields) -> None:
        """Whether sizes agree with each other: shards lie on the grid without gap or overlap, parts likewise."""
        names = [entry.point for entry in self.hook_points]
        if len(set(names)) != len(names):
            raise fields.error("hook_points", "must name each hook point once", [str(name) for name in names])
        grid = self.grid
        for index, entry in enumerate(self.hook_points):
            if len(entry.shards) != grid.shards:
                at = f"hook_points[{index}].shards"
                raise fields.error(at, f"must list {grid.shards} shards, as rows and shard_rows say", len(entry.shards))
            for shard, listed in enumerate(entry.shards):
                expected = grid.rows_of(shard)
                if (listed.first_row, listed.rows) != (expected.start, len(expected)):
                    at = f"hook_points[{index}].shards[{shard}]"
                    rule = f"must hold rows {expected.start} to {expected.stop - 1}"
                    raise fields.error(at, rule, f"{listed.first_row} to {listed.first_row + listed.rows - 1}")
        row = document = 0
        for index, part in enumerate(self.tokens):
            if (part.first_row, part.first_document) != (row, document):
                rule = f"must start at row {row} and document {document}"
                raise fields.error(f"tokens[{index}]", rule, f"{part.first_row} and {part.first_document}")
            row, document = row + part.rows, document + part.documents
        if (row, document) != (self.rows, self.documents):
            rule = f"must hold {self.rows} rows and {self.documents} documents in all"
            raise fields.error("tokens", rule, f"{row} and {document}")
