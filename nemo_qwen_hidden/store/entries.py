"""The parts of a manifest: files, shards, parts, hook points. Unknown optional fields are kept."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.fields import Fields
from nemo_qwen_hidden.store.files import check_name
from nemo_qwen_hidden.store.format import HOOK_POINT_NAME, MANIFEST
from nemo_qwen_hidden.store.statistics import ShardStatistics, StoredError

NORMS = ("before", "after")
MOST_NUMBERS = 2**24  # of one state: a store without states has no file that contradicts any size
_MOST_AXES = 8
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
    """One shard file: states ``first_row`` to ``first_row + rows`` of the store, which in a full store are its rows.

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

    shard_rows: states of one of its shards. tokens, lines: its two files. data: where its documents came from (JSON
    values). Its token table counts rows and documents from 0. kept: the number of its rows whose states are stored,
    None where all are; its token table says which. selection: the rule that chose them (JSON values).
    """

    first_row: int
    rows: int
    first_document: int
    documents: int
    shard_rows: int
    tokens: FileEntry
    lines: FileEntry
    data: Mapping[str, Any] = field(default_factory=dict)
    kept: int | None = None
    weighted: bool = False
    selection: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Fields) -> "Part":
        part = cls(
            first_row=fields.integer("first_row"),
            rows=fields.integer("rows"),
            first_document=fields.integer("first_document"),
            documents=fields.integer("documents"),
            shard_rows=fields.integer("shard_rows", minimum=1),
            tokens=FileEntry.parse(fields.nested("tokens")),
            lines=FileEntry.parse(fields.nested("documents_file")),
            data=fields.mapping("data"),
            kept=fields.integer("kept") if "kept" in fields else None,
            weighted=fields.boolean("weighted") if "weighted" in fields else False,
            selection=fields.mapping("selection") if "selection" in fields else None,
            extra=fields.rest(),
        )
        if part.kept is not None and part.kept > part.rows:
            raise fields.error("kept", f"must be at most {part.rows}, the part's rows", part.kept)
        if part.kept is None and part.weighted:
            raise fields.error("weighted", "must stand beside `kept`", True)
        if part.kept is None and part.selection is not None:
            raise fields.error("selection", "must stand beside `kept`", part.selection)
        return part

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
            **({} if self.kept is None else {"kept": self.kept}),
            **({"weighted": True} if self.weighted else {}),
            **({} if self.selection is None else {"selection": dict(self.selection)}),
            **self.extra,
        }

    @property
    def states(self) -> int:
        """How many of its rows have states."""
        return self.rows if self.kept is None else self.kept


@dataclass(frozen=True, kw_only=True)
class HookPointEntry:
    """What is stored of one hook point.

    shape: of one state; it is stored flat, as ``width`` numbers, the last axis fastest. heads: of attention weights,
    which heads the first axis is, None where it is all of them. norm: whether the state was taken ``before`` or
    ``after`` the model's final norm. huggingface_index: into ``hidden_states``, None where that tuple lacks this state.
    divisor: whether shards have, beside states after the final norm, what that norm divided each by, so that the states
    before it can be had. shards: in order of states; None stands for one that is not there yet, which only an
    unfinished store has.
    """

    point: HookPoint
    meaning: str
    norm: str
    huggingface_index: int | None
    shape: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    divisor: bool = False
    shards: tuple[ShardEntry | None, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        point: HookPoint,
        *,
        num_layers: int,
        shards: int,
        shape: Sequence[int],
        heads: Sequence[int] | None = None,
        divisor: bool = False,
    ) -> "HookPointEntry":
        """The entry of ``point`` in a model of ``num_layers`` layers, with none of its ``shards`` there yet."""
        return cls(
            point=point,
            meaning=point.meaning(num_layers),
            norm=norm_of(point),
            huggingface_index=point.huggingface_index(num_layers),
            shape=tuple(shape),
            heads=None if heads is None else tuple(heads),
            divisor=divisor and point.normed,
            shards=(None,) * shards,
        )

    @classmethod
    def parse(cls, fields: Fields, hidden_size: int) -> "HookPointEntry":
        """From its fields. hidden_size: H, of a state whose shape is not said."""
        name, site, layer = fields.text("name"), fields.text("site"), fields.optional_integer("layer")
        # not HookPoint.parse: a store may hold sites of a later release
        if HOOK_POINT_NAME.fullmatch(name) is None or str(HookPoint(site, layer)) != name:
            raise fields.error("name", f"must be made of site ({site!r}) and layer ({layer})", name)
        shape = _shape(fields) if "shape" in fields else (hidden_size,)
        return cls(
            point=HookPoint(site, layer),
            meaning=fields.text("meaning"),
            norm=fields.choice("norm", NORMS),
            huggingface_index=fields.optional_integer("huggingface_index"),
            shape=shape,
            heads=_heads(fields, shape) if "heads" in fields else None,
            divisor="divisor" in fields and fields.boolean("divisor"),
            shards=tuple(None if entry is None else ShardEntry.parse(entry) for entry in fields.each_or_null("shards")),
            extra=fields.rest(),
        )

    def as_dict(self, hidden_size: int) -> dict[str, Any]:
        """Its fields, without a shape that is [H]."""
        return {
            "name": str(self.point),
            "site": self.point.site,
            "layer": self.point.layer,
            "meaning": self.meaning,
            "norm": self.norm,
            "huggingface_index": self.huggingface_index,
            **({} if self.shape == (hidden_size,) else {"shape": list(self.shape)}),
            **({} if self.heads is None else {"heads": list(self.heads)}),
            **({"divisor": True} if self.divisor else {}),
            "shards": [shard and shard.as_dict() for shard in self.shards],
            **self.extra,
        }

    @property
    def width(self) -> int:
        """Numbers in one state."""
        return prod(self.shape)

    @property
    def present(self) -> tuple[ShardEntry, ...]:
        """The shards that are there."""
        return tuple(shard for shard in self.shards if shard is not None)


def norm_of(point: HookPoint) -> str:
    """``after`` where ``point`` lies behind the final norm, else ``before``."""
    return "after" if point.normed else "before"


def _shape(fields: Fields) -> tuple[int, ...]:
    shape = fields.integers("shape")
    if not 1 <= len(shape) <= _MOST_AXES or not 1 <= prod(shape) <= MOST_NUMBERS:
        rule = f"must have 1 to {_MOST_AXES} axes and 1 to {MOST_NUMBERS} numbers"
        raise fields.error("shape", rule, list(shape))
    return shape


def _heads(fields: Fields, shape: tuple[int, ...]) -> tuple[int, ...]:
    heads = fields.integers("heads")
    if len(shape) < 2 or len(heads) != shape[0] or len(set(heads)) != len(heads):
        raise fields.error("heads", f"must name each head along the first axis of {list(shape)} once", list(heads))
    return heads


def _file(fields: Fields, name: str) -> str:
    return check_name(fields.text(name), setting=f"{MANIFEST}: {fields.path(name)}")


def _sha256(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if _SHA256.fullmatch(text) is None:
        raise fields.error(name, "must be 64 hexadecimal digits", text)
    return text
