"""The record of what a store is. Unknown optional fields are kept; an unknown version is refused."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import MOST_NUMBERS, FileEntry, HookPointEntry, Part, ShardEntry
from nemo_qwen_hidden.store.fields import Fields, load_json, to_json
from nemo_qwen_hidden.store.format import (
    DTYPES,
    FORMAT,
    MANIFEST,
    VERSIONS_READ,
    Dtype,
    ShardGrid,
)

NO_DIGEST = "0" * 64
MEANS = ("mean", "weighted_mean")
POOLINGS = ("last", *MEANS)
_SINCE_VERSION_2 = {
    "pooling": "",
    "kept": "parts",
    "weighted": "parts",
    "selection": "parts",
    "shape": "hook_points",
    "heads": "hook_points",
}
"""Fields, and the list whose objects have them."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """hidden_size: H. compute_dtype: what the model ran in, a name for people. stored_dtype: one of ``format.DTYPES``.
    pooling: how the states of a document were made one; None where they were not. final_norm: the file with the weight
    of the model's final norm, None where it is not known. model, tokenizer: what made the states. producers: who, how
    and when, one for each job that worked on the store (JSON values). extra: fields that this release does not know."""

    hidden_size: int
    compute_dtype: str
    stored_dtype: str
    hook_points: tuple[HookPointEntry, ...]
    parts: tuple[Part, ...]
    pooling: str | None = None
    final_norm: FileEntry | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    producers: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    dtypes_extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The first version of the format that can say all of this."""
        parted = any(part.kept is not None for part in self.parts)
        shaped = any(entry.shape != (self.hidden_size,) for entry in self.hook_points)
        return 2 if parted or shaped or self.pooling is not None else 1

    @property
    def rows(self) -> int:
        """N, the number of tokens."""
        return sum(part.rows for part in self.parts)

    @property
    def states(self) -> int:
        """K, the number of rows whose states are stored."""
        return sum(part.states for part in self.parts)

    @cached_property
    def first_states(self) -> tuple[int, ...]:
        """The first state of each part, then the number of states."""
        return (0, *accumulate(part.states for part in self.parts))

    @property
    def documents(self) -> int:
        """The number of documents."""
        return sum(part.documents for part in self.parts)

    @property
    def dtype(self) -> Dtype:
        """The stored dtype."""
        return DTYPES[self.stored_dtype]

    @cached_property
    def grid(self) -> ShardGrid:
        """Which states lie in which shard, the same for every hook point."""
        return ShardGrid((part.states, part.shard_rows) for part in self.parts)

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """The hook points, in order of depth."""
        return tuple(entry.point for entry in self.hook_points)

    def entry(self, point: HookPoint) -> HookPointEntry:
        """What is stored of ``point``; KeyError where nothing is."""
        return self._entries[point]

    @cached_property
    def _entries(self) -> dict[HookPoint, HookPointEntry]:
        return {entry.point: entry for entry in self.hook_points}

    def part_of(self, shard: int) -> Part:
        """The part that a shard belongs to."""
        return self.parts[self.grid.part_of(shard)]

    def missing(self) -> Iterator[tuple[HookPoint, int]]:
        """Hook point and number of every shard that is not there yet."""
        for entry in self.hook_points:
            yield from ((entry.point, shard) for shard, found in enumerate(entry.shards) if found is None)

    def files(self) -> Iterator[FileEntry | ShardEntry]:
        """Every file that is there."""
        if self.final_norm is not None:
            yield self.final_norm
        for part in self.parts:
            yield from (part.tokens, part.lines)
        for entry in self.hook_points:
            yield from entry.present

    @classmethod
    def from_json(cls, text: bytes, file: str = MANIFEST) -> "Manifest":
        """The manifest in ``text``; ``file`` is its name in errors.

        Raises:
            StoreError: not a manifest of ours, of another version, changed since it was written, or inconsistent;
                names file and field.
        """
        values = load_json(text, file)
        fields = Fields(values, file=file)
        version = cls._check_version(fields)
        digest = fields.text("sha256")
        if digest != _digest(text, digest):
            raise fields.error(
                "sha256", f"must be {_digest(text, digest)}: the file was changed after it was written", digest
            )
        manifest = cls.parse(fields, version)
        missing = next(manifest.missing(), None)
        if missing is not None:
            raise fields.error("hook_points", "must list every shard", f"no shard {missing[1]} of {missing[0]}")
        return manifest

    def to_json(self) -> bytes:
        """UTF-8, a line for each field and each entry of its lists; what ``from_json`` reads."""
        values = self.as_dict()
        blank = to_json({"format": FORMAT, "version": self.version, "sha256": NO_DIGEST} | values)
        return blank.replace(NO_DIGEST.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)

    @classmethod
    def parse(cls, fields: Fields, version: int) -> "Manifest":
        """A manifest from the fields of ``as_dict``, of which shards may be missing, in a version of the format.

        Raises:
            StoreError: inconsistent; names file and field.
        """
        dtypes, hidden_size = fields.nested("dtypes"), fields.integer("hidden_size", minimum=1)
        if hidden_size > MOST_NUMBERS:
            raise fields.error("hidden_size", f"must be at most {MOST_NUMBERS}", hidden_size)
        listed = {"": [fields], "parts": fields.each("parts"), "hook_points": fields.each("hook_points")}
        if version == 1:
            _refuse_later_fields(listed)
        manifest = cls(
            hidden_size=hidden_size,
            compute_dtype=dtypes.text("compute"),
            stored_dtype=dtypes.choice("stored", tuple(DTYPES)),
            parts=tuple(Part.parse(part) for part in listed["parts"]),
            hook_points=tuple(HookPointEntry.parse(entry, hidden_size) for entry in listed["hook_points"]),
            pooling=fields.choice("pooling", POOLINGS) if "pooling" in fields else None,
            final_norm=FileEntry.parse(fields.nested("final_norm")) if "final_norm" in fields else None,
            model=fields.mapping("model"),
            tokenizer=fields.mapping("tokenizer"),
            producers=tuple(producer.rest() for producer in fields.each("producers")),
            extra={},
            dtypes_extra=dtypes.rest(),
        )
        manifest._check(fields)
        object.__setattr__(manifest, "extra", fields.rest())
        return manifest

    def as_dict(self) -> dict[str, Any]:
        """JSON values, in one order of keys."""
        return {
            "rows": self.rows,
            "documents": self.documents,
            "hidden_size": self.hidden_size,
            "dtypes": {"compute": self.compute_dtype, "stored": self.stored_dtype, **self.dtypes_extra},
            "model": dict(self.model),
            "tokenizer": dict(self.tokenizer),
            "producers": [dict(producer) for producer in self.producers],
            **({} if self.pooling is None else {"pooling": self.pooling}),
            **({} if self.final_norm is None else {"final_norm": self.final_norm.as_dict()}),
            "parts": [part.as_dict() for part in self.parts],
            "hook_points": [entry.as_dict(self.hidden_size) for entry in self.hook_points],
            **self.extra,
        }

    @staticmethod
    def _check_version(fields: Fields) -> int:
        fields.choice("format", (FORMAT,))
        version = fields.integer("version")
        if version not in VERSIONS_READ:
            known = ", ".join(str(number) for number in VERSIONS_READ)
            raise fields.error("version", f"must be one that this release of nemo_qwen_hidden reads ({known})", version)
        return version

    def _check(self, fields: Fields) -> None:
        """Whether sizes agree with each other: parts follow each other, shards lie on the grid."""
        row = document = shards = 0
        for index, part in enumerate(self.parts):
            if (part.first_row, part.first_document) != (row, document):
                rule = f"must start at row {row} and document {document}"
                raise fields.error(f"parts[{index}]", rule, f"{part.first_row} and {part.first_document}")
            row, document = row + part.rows, document + part.documents
            shards += -(-part.states // part.shard_rows)
        for name, size in (("rows", row), ("documents", document)):
            given = fields.integer(name)
            if given != size:
                raise fields.error(name, f"must be {size}, as the parts say", given)
        self._check_selection(fields)
        if len(set(self.points)) != len(self.points) or not self.points:
            raise fields.error("hook_points", "must name each hook point once", [str(name) for name in self.points])
        for index, entry in enumerate(self.hook_points):  # before the grid is made, whose size the file decides
            if len(entry.shards) != shards:
                at = f"hook_points[{index}].shards"
                raise fields.error(at, f"must list {shards} shards, as the parts say", len(entry.shards))
        names = {MANIFEST}
        for file in self.files():
            if file.file in names:
                raise fields.error("hook_points", "must name each file once", file.file)
            names.add(file.file)
        starts = self.grid.starts
        for index, entry in enumerate(self.hook_points):
            for shard, listed in enumerate(entry.shards):
                if listed is not None and (listed.first_row, listed.first_row + listed.rows) != (
                    starts[shard],
                    starts[shard + 1],
                ):
                    rule = f"must hold states {starts[shard]} to {starts[shard + 1] - 1}"
                    found = f"{listed.first_row} to {listed.first_row + listed.rows - 1}"
                    raise fields.error(f"hook_points[{index}].shards[{shard}]", rule, found)

    def _check_selection(self, fields: Fields) -> None:
        """Whether the states of all parts were chosen alike."""
        for index, part in enumerate(self.parts):
            first, at = self.parts[0], f"parts[{index}]"
            if (part.kept is None) != (first.kept is None):
                raise fields.error(f"{at}.kept", "must be there in all parts or in none", part.kept)
            if part.selection != first.selection:
                raise fields.error(f"{at}.selection", "must be that of parts[0]", part.selection)
            if self.pooling is not None and part.kept is None:
                raise fields.error(f"{at}.kept", "must be there, since states are pooled", None)


def _refuse_later_fields(listed: Mapping[str, list[Fields]]) -> None:
    """Of a manifest of version 1."""
    for name, where in _SINCE_VERSION_2.items():
        for fields in listed[where]:
            if name in fields:
                raise fields.error(name, "must not be in a manifest of version 1", "there")


def _digest(text: bytes, digest: str) -> str:
    """SHA-256 of the file with zeros in place of its own digest."""
    return hashlib.sha256(text.replace(digest.encode(), NO_DIGEST.encode(), 1)).hexdigest()
