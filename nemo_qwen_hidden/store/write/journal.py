"""What has been done of an unfinished store. A line is written only after the bytes that it speaks of are durable, so
that a crash can lose work and never truth.

Every process that writes has a file of its own under ``journal/``; a line is the CRC-32 of its JSON in hexadecimal, a
space, and the JSON. A file is read up to its first line that is not whole.
"""

import json
import os
import secrets
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet, union
from nemo_qwen_hidden.store.entries import Part, ShardEntry
from nemo_qwen_hidden.store.fields import Fields, load_json
from nemo_qwen_hidden.store.files import naming_store, open_inside, sync_folder, write_all, write_durably
from nemo_qwen_hidden.store.format import JOURNAL, JOURNAL_FILES, Shard
from nemo_qwen_hidden.store.statistics import StoredError, add_error

Ranges = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Added:
    """A part that was added to a store whose manifest does not list it yet, and its shards. number: of the part."""

    number: int
    part: Part
    shards: Mapping[Shard, ShardEntry]

    def as_line(self) -> dict[str, Any]:
        shards = [
            {"hook_point": str(point), "shard": number, **entry.as_dict()}
            for (point, number), entry in self.shards.items()
        ]
        return {"added": {"number": self.number, "part": self.part.as_dict(), "shards": shards}}

    @classmethod
    def parse(cls, fields: Fields) -> "Added":
        number, part = fields.integer("number"), Part.parse(fields.nested("part"))
        shards = {_take_shard(each): ShardEntry.parse(each) for each in fields.each("shards")}
        return cls(number=number, part=part, shards=shards)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the lines of a journal say, in numbers of states. rows: durable in shards that are not done yet, by hook
    point. twice: hook points of which a row was written more than once. errors: what storing cost, of the rows of each
    shard. sealed: shards that are done. added: whole parts, by number; durable or not."""

    rows: Mapping[HookPoint, RowSet] = field(default_factory=dict)
    twice: frozenset[HookPoint] = frozenset()
    errors: Mapping[Shard, StoredError] = field(default_factory=dict)
    sealed: Mapping[Shard, ShardEntry] = field(default_factory=dict)
    added: Mapping[int, Added] = field(default_factory=dict)

    def without(self, shards: Mapping[Shard, range]) -> "Record":
        """The record with everything forgotten that concerns some shards, given with their rows."""
        gone: dict[HookPoint, Ranges] = {}
        for (point, _), rows in shards.items():
            gone.setdefault(point, []).append((rows.start, len(rows)))
        return Record(
            rows={point: rows - RowSet(gone.get(point, ())) for point, rows in self.rows.items()},
            twice=self.twice,
            errors={shard: error for shard, error in self.errors.items() if shard not in shards},
            sealed={shard: entry for shard, entry in self.sealed.items() if shard not in shards},
            added=self.added,
        )

    def as_lines(self) -> Iterable[dict[str, Any]]:
        """Lines that say all of it."""
        rows = {point: ranges for point, found in self.rows.items() if (ranges := found.ranges)}
        yield from _row_lines(rows, self.errors)
        yield from (_sealed_line(shard, entry) for shard, entry in self.sealed.items())
        yield from (added.as_line() for added in self.added.values())


class JournalWriter:
    """One process's file in the journal of the store in ``folder``; every call but ``added`` returns when its line is
    durable."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._path = folder / JOURNAL / f"{rank}-{secrets.token_hex(8)}.jsonl"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        self._descriptor, self._bytes = os.open(self._path, flags, 0o666), 0
        sync_folder(self._path.parent)

    def rows(self, rows: Mapping[HookPoint, Ranges], errors: Mapping[Shard, StoredError]) -> None:
        """These rows are durable. errors: of these rows alone."""
        self._write(_row_lines(rows, errors))

    def sealed(self, shards: Mapping[Shard, ShardEntry]) -> None:
        """These shards have their final names and content."""
        self._write(_sealed_line(shard, entry) for shard, entry in shards.items())

    def added(self, added: Added) -> None:
        """A part whose files have their final names and content, durable or not: see ``sync``."""
        self._write([added.as_line()], durable=False)

    def sync(self) -> None:
        """Returns when all lines are durable."""
        with naming_store(self._folder, JOURNAL):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, lines: Iterable[dict[str, Any]], *, durable: bool = True) -> None:
        text = b"".join(map(_line, lines))
        if os.fstat(self._descriptor).st_nlink == 0:
            rule = "must stay where it is while it is written (its journal has vanished)"
            raise StoreError("store.path", rule, str(self._folder))
        with naming_store(self._folder, JOURNAL):
            write_all(self._descriptor, text, self._bytes)
            if durable:
                os.fsync(self._descriptor)
        self._bytes += len(text)


def read(folder: Path) -> Record:
    """The journal of the store in ``folder``.

    Raises:
        StoreError: a file cannot be read, or a whole line makes no sense.
    """
    lines = {name: _whole_lines(folder, f"{JOURNAL}/{name}") for name in _names(folder)}
    replaced = {name for found in lines.values() for line in found for name in line.get("replaces", ())}
    rows: dict[HookPoint, list[RowSet]] = {}
    errors: dict[Shard, StoredError] = {}
    sealed: dict[Shard, ShardEntry] = {}
    added: dict[int, Added] = {}
    for name in lines.keys() - replaced:
        for line in lines[name]:
            fields = Fields(line, file=str(folder / JOURNAL / name))
            for each in fields.each("rows") if "rows" in fields else ():
                _take_rows(each, rows)
            for each in fields.each("errors") if "errors" in fields else ():
                shard, error = _take_shard(each), StoredError.parse(each)
                add_error(errors, shard, error)
            if "sealed" in fields:
                each = fields.nested("sealed")
                sealed[_take_shard(each)] = ShardEntry.parse(each)
            if "added" in fields:
                part = Added.parse(fields.nested("added"))
                added[part.number] = part
    found = {point: union(sets) for point, sets in rows.items()}
    twice = frozenset(point for point, sets in rows.items() if sum(map(len, sets)) != len(found[point]))
    return Record(rows=found, twice=twice, errors=errors, sealed=sealed, added=added)


def replace(folder: Path, record: Record) -> None:
    """Makes ``record`` the whole of the journal, in one file."""
    old = _names(folder)
    lines = ({"replaces": old}, *record.as_lines())
    write_durably(folder / JOURNAL / f"0-{secrets.token_hex(8)}.jsonl", b"".join(map(_line, lines)))
    for name in old:
        (folder / JOURNAL / name).unlink()
    sync_folder(folder / JOURNAL)  # else one could come back when the file that replaces it has been replaced


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder / JOURNAL) if JOURNAL_FILES.fullmatch(name))


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _whole_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Up to the first line that a crash has cut off."""
    with os.fdopen(open_inside(folder, name), "rb") as file:
        found = []
        for line in file:
            crc, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text[:-1]):
                break
            found.append(load_json(text, str(folder / name)))
        return found


def _row_lines(rows: Mapping[HookPoint, Ranges], errors: Mapping[Shard, StoredError]) -> Iterable[dict[str, Any]]:
    """One line, so that rows and their errors are there together or not at all. Hook points of the same rows share."""
    shared: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for point, ranges in rows.items():
        shared.setdefault(tuple(ranges), []).append(str(point))
    if shared:
        yield {
            "rows": [{"hook_points": points, "ranges": list(ranges)} for ranges, points in shared.items()],
            "errors": [
                {"hook_point": str(point), "shard": number, **error.as_dict()}
                for (point, number), error in errors.items()
            ],
        }


def _sealed_line(shard: Shard, entry: ShardEntry) -> dict[str, Any]:
    return {"sealed": {"hook_point": str(shard[0]), "shard": shard[1], **entry.as_dict()}}


def _take_rows(fields: Fields, rows: dict[HookPoint, list[RowSet]]) -> None:
    ranges = RowSet(fields.pairs("ranges"))
    for name in fields.texts("hook_points"):
        rows.setdefault(HookPoint.parse(name), []).append(ranges)


def _take_shard(fields: Fields) -> Shard:
    return HookPoint.parse(fields.text("hook_point")), fields.integer("shard")
