"""The parts of a manifest: files, shards, parts, hook points. Unknown optional fields are kept."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.fields import Fields
from nemo_qwen_hidden.store.files import check_name
from nemo_qwen_hidden.store.format import HOOK_POINT_NAME, MANIFEST
from nemo_qwen_hidden.store.statistics import ShardStatistics, StoredError

NORMS = ("before", "after")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file by its path in the store, its size, and the SHA-256 of all of it in hexadecimal."""

    file: str
    bytes: int
    sha256: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Fields) -> "FileEntry":
        return cls(
            file=_file(fields, "file"),
            bytes=fields.integer("bytes"),
            sha256=_sha256(fields, "sha256"),
            extra=fields.rest(),
        )

    def as_dict(self) -> dict[str, Any]:
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256, **self.extra}


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard file: rows ``first_row`` to ``first_row + rows`` of the store.

    statistics: of its values. error: what the stored dtype cost, None where it holds every value as it was.
    """

    file: str
    first_row: int
    rows: int
    bytes: int
    sha256: str
    statistics: ShardStatistics
    error: StoredError | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Fields) -> "ShardEntry":
        return cls(
            file=_file(fields, "file"),
            first_row=fields.integer("first_row"),
            rows=fields.integer("rows", minimum=1),
            bytes=fields.integer("bytes"),
            sha256=_sha256(fields, "sha256"),
            statistics=ShardStatistics.parse(fields.nested("statistics")),
            error=StoredError.parse(fields.nested("error")) if "error" in fields else None,
            extra=fields.rest(),
        )

    def as_dict(self) -> dict[str, Any]:
        error = {} if self.error is None else {"error": self.error.as_dict()}
        return {
            "file": self.file,
            "first_row": self.first_row,
            "rows": self.rows,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "statistics": self.statistics.as_dict(),
            **error,
            **self.extra,
        }


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive rows and documents that came into the store together, and the token table that describes them.

    shard_rows: rows of one of its shards. tokens, lines: its two files. data: where its documents came from (JSON
    values). Its token table counts rows and documents from 0.
    """

    first_row: int
    rows: int
    first_document: int
    documents: int
    shard_rows: int
    tokens: FileEntry
    lines: FileEntry
    data: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Fields) -> "Part":
        return cls(
            first_row=fields.integer("first_row"),
            rows=fields.integer("rows"),
            first_document=fields.integer("first_document"),
            documents=fields.integer("documents"),
            shard_rows=fields.integer("shard_rows", minimum=1),
            tokens=FileEntry.parse(fields.nested("tokens")),
            lines=FileEntry.parse(fields.nested("documents_file")),
            data=fields.mapping("data"),
            extra=fields.rest(),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "first_row": self.first_row,
            "rows": self.rows,
            "first_document": self.first_document,
            "documents": self.documents,
            "shard_rows": self.shard_rows,
            "tokens": self.tokens.as_dict(),
            "documents_file": self.lines.as_dict(),
            "data": dict(self.data),
            **self.extra,
        }


@dataclass(frozen=True, kw_only=True)
class HookPointEntry:
    """What is stored of one hook point.

    norm: whether the state was taken ``before`` or ``after`` the model's final norm. huggingface_index: into
    ``hidden_states``, None where that tuple lacks this state. divisor: whether shards have, beside states after the
    final norm, what that norm divided each row by, so that the states before it can be had. shards: in order of rows;
    None stands for one that is not there yet, which only an unfinished store has.
    """

    point: HookPoint
    meaning: str
    norm: str
    huggingface_index: int | None
    divisor: bool = False
    shards: tuple[ShardEntry | None, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, point: HookPoint, *, num_layers: int, shards: int, divisor: bool = False) -> "HookPointEntry":
        """The entry of ``point`` in a model of ``num_layers`` layers, with none of its ``shards`` there yet."""
        return cls(
            point=point,
            meaning=point.meaning(num_layers),
            norm=norm_of(point),
            huggingface_index=point.huggingface_index(num_layers),
            divisor=divisor and point.normed,
            shards=(None,) * shards,
        )

    @classmethod
    def parse(cls, fields: Fields) -> "HookPointEntry":
        name, site, layer = fields.text("name"), fields.text("site"), fields.optional_integer("layer")
        # not HookPoint.parse: a store may hold sites of a later release
        if HOOK_POINT_NAME.fullmatch(name) is None or str(HookPoint(site, layer)) != name:
            raise fields.error("name", f"must be made of site ({site!r}) and layer ({layer})", name)
        return cls(
            point=HookPoint(site, layer),
            meaning=fields.text("meaning"),
            norm=fields.choice("norm", NORMS),
            huggingface_index=fields.optional_integer("huggingface_index"),
            divisor="divisor" in fields and fields.boolean("divisor"),
            shards=tuple(None if entry is None else ShardEntry.parse(entry) for entry in fields.each_or_null("shards")),
            extra=fields.rest(),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": str(self.point),
            "site": self.point.site,
            "layer": self.point.layer,
            "meaning": self.meaning,
            "norm": self.norm,
            "huggingface_index": self.huggingface_index,
            **({"divisor": True} if self.divisor else {}),
            "shards": [shard and shard.as_dict() for shard in self.shards],
            **self.extra,
        }

    @property
    def present(self) -> tuple[ShardEntry, ...]:
        """The shards that are there."""
        return tuple(shard for shard in self.shards if shard is not None)


def norm_of(point: HookPoint) -> str:
    """``after`` where ``point`` lies behind the final norm, else ``before``."""
    return "after" if point.normed else "before"


def _file(fields: Fields, name: str) -> str:
    return check_name(fields.text(name), setting=f"{MANIFEST}: {fields.path(name)}")


def _sha256(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if _SHA256.fullmatch(text) is None:
        raise fields.error(name, "must be 64 hexadecimal digits", text)
    return text
