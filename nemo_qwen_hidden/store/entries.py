"""The parts of a manifest: a shard, a part of the token table, a hook point. Unknown optional fields are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.fields import Fields
from nemo_qwen_hidden.store.files import check_name
from nemo_qwen_hidden.store.format import HOOK_POINT_NAME, MANIFEST

NORMS = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard file, by its path in the store: rows ``first_row`` to ``first_row + rows``; bytes of the whole file."""

    file: str
    first_row: int
    rows: int
    bytes: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Fields) -> "ShardEntry":
        return cls(
            file=_file(fields, "file"),
            first_row=fields.integer("first_row"),
            rows=fields.integer("rows", minimum=1),
            bytes=fields.integer("bytes"),
            extra=fields.rest(),
        )

    def as_dict(self) -> dict[str, Any]:
        return {"file": self.file, "first_row": self.first_row, "rows": self.rows, "bytes": self.bytes, **self.extra}


@dataclass(frozen=True, kw_only=True)
class TokenPart:
    """One part of the token table: consecutive rows and documents, and the two files that describe them.

    bytes: of both files together.
    """

    file: str
    documents_file: str
    first_row: int
    rows: int
    first_document: int
    documents: int
    bytes: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Fields) -> "TokenPart":
        return cls(
            file=_file(fields, "file"),
            documents_file=_file(fields, "documents_file"),
            first_row=fields.integer("first_row"),
            rows=fields.integer("rows"),
            first_document=fields.integer("first_document"),
            documents=fields.integer("documents"),
            bytes=fields.integer("bytes"),
            extra=fields.rest(),
        )

    def as_dict(self) -> dict[str, Any]:
        known = {name: value for name, value in vars(self).items() if name != "extra"}
        return {**known, **self.extra}


@dataclass(frozen=True, kw_only=True)
class HookPointEntry:
    """What is stored of one hook point.

    norm: whether the state was taken ``before`` or ``after`` the model's final norm. huggingface_index: into
    ``hidden_states``, None where that tuple lacks this state. shards: in order of rows.
    """

    point: HookPoint
    meaning: str
    norm: str
    huggingface_index: int | None
    shards: tuple[ShardEntry, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, point: HookPoint, *, num_layers: int) -> "HookPointEntry":
        """The entry of ``point`` in a model of ``num_layers`` layers, without shards."""
        return cls(
            point=point,
            meaning=point.meaning(num_layers),
            norm=norm_of(point),
            huggingface_index=point.huggingface_index(num_layers),
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
            shards=tuple(ShardEntry.parse(shard) for shard in fields.each("shards")),
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
            "shards": [shard.as_dict() for shard in self.shards],
            **self.extra,
        }


def norm_of(point: HookPoint) -> str:
    """``after`` where ``point`` lies behind the final norm, else ``before``."""
    return "after" if point.normed else "before"


def _file(fields: Fields, name: str) -> str:
    return check_name(fields.text(name), setting=f"{MANIFEST}: {fields.path(name)}")
