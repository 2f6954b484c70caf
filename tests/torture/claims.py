"""Whether what a folder says of itself is true, by numpy, json and hashlib; and whether two stores are the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.header import Header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import DIVISOR, SCALE, header_of
from nemo_qwen_hidden.store.write import journal, session

TOLERANCE = 5e-6


class Broken(AssertionError):
    """A promise was."""


def insist(held: bool, promise: str, *details: Any) -> None:
    if not held:
        raise Broken(" ".join([promise, *map(str, details)]))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_claims(store: Path, reference: Path, *, same: bool, cut: bool, replacing: bool = False) -> str:
    """What is claimed after a crash, held against an undisturbed store. same: byte for byte. cut: the power went, so
    that what is claimed may have lost its file's name. replacing: other documents' token table may still be there.
    Says how much is claimed."""
    if (store / "manifest.json").exists():
        _check_manifest(store)
    if not (store / "unfinished.json").exists():
        return "finished" if (store / "manifest.json").exists() else "nothing"
    target = session.find(store).unfinished
    assert target is not None
    for part in target.parts:
        for file in (part.tokens, part.lines):
            if not replacing and (store / file.file).exists():
                insist(sha256(store / file.file) == file.sha256, "a token table is not what it claims", file.file)
    if not (store / "journal").is_dir():
        return "begun"
    record = journal.read(store)
    insist(not record.twice, "no row is written twice", record.twice)
    for shard, entry in record.sealed.items():
        path = store / entry.file
        if not path.is_file():
            insist(cut, "a sealed shard is there", entry.file)
            continue
        insist(sha256(path) == entry.sha256, "a sealed shard is what the journal says", entry.file)
        if same:
            insist(sha256(reference / entry.file) == entry.sha256, "a sealed shard is the undisturbed one", entry.file)
        else:
            _compare_rows(path, reference / entry.file, shard, target, RowSet([(entry.first_row, entry.rows)]), False)
    rows = 0
    for shard in target.missing():
        inside = target.grid.states_of(shard[1])
        claimed = record.rows.get(shard[0], RowSet()) & RowSet([(inside.start, len(inside))])
        rows += len(claimed)
        if shard in record.sealed or not len(claimed):
            continue
        _check_rows(store, reference, shard, target, claimed, same=same, cut=cut)
        error = record.errors.get(shard)
        if target.stored_dtype != "fp32":
            insist(error is not None and error.rows == len(claimed), "errors are of the claimed rows", shard, error)
    return f"{rows} rows, {len(record.sealed)} sealed"


def _check_manifest(store: Path) -> None:
    manifest = Manifest.from_json((store / "manifest.json").read_bytes())
    for file in manifest.files():
        path = store / file.file
        insist(path.is_file() and path.stat().st_size == file.bytes, "a file of the manifest is there", file.file)
        insist(sha256(path) == file.sha256, "a file is what the manifest says", file.file)


def _check_rows(
    store: Path, reference: Path, shard: Any, target: Manifest, claimed: RowSet, *, same: bool, cut: bool
) -> None:
    """Claimed rows of a shard that is not done yet."""
    final = store / str(shard[0]) / f"{shard[1]:06d}.safetensors"
    partial = final.with_name(final.name + ".partial")
    found = [path for path in (partial, final) if path.is_file()]
    size = header_of(shard, target)[1].size_bytes
    if not found or found[0].stat().st_size != size:
        insist(cut, "a shard with claimed rows is there", final)
        return
    _compare_rows(found[0], reference / str(shard[0]) / final.name, shard, target, claimed, same)


def _compare_rows(path: Path, reference: Path, shard: Any, target: Manifest, rows: RowSet, same: bool) -> None:
    start, header = header_of(shard, target)
    mine, other = path.read_bytes(), reference.read_bytes()
    insist(mine[: len(start)] == start == other[: len(start)], "a shard has its header", path)
    first = target.grid.starts[shard[1]]
    for begin, length in rows.ranges:
        for tensor, width in _widths(header, shard, target):
            at = header.offsets[tensor] + (begin - first) * width
            left, right = mine[at : at + length * width], other[at : at + length * width]
            if same:
                insist(left == right, "claimed rows are the undisturbed ones", path, tensor, begin, length)
            else:
                worst = _difference(left, right, width // 4)
                insist(worst <= TOLERANCE, "claimed rows are the same within 5e-6", path, begin, length, worst)


def _widths(header: Header, shard: Any, target: Manifest) -> list[tuple[str, int]]:
    widths = [(str(shard[0]), target.entry(shard[0]).width * target.dtype.bytes)]
    return [*widths, *((name, 4) for name in (SCALE, DIVISOR) if name in header.offsets)]


def _difference(left: bytes, right: bytes, hidden_size: int) -> float:
    """Largest relative norm over rows of fp32."""
    mine, other = (np.frombuffer(half, "<f4").reshape(-1, hidden_size).astype(np.float64) for half in (left, right))
    if not np.isfinite(mine).all():
        return float("inf")
    return float((np.linalg.norm(mine - other, axis=1) / np.linalg.norm(other, axis=1)).max())


def check_same(store: Path, reference: Path, *, same: bool) -> None:
    """Whether a finished store is the undisturbed one: byte for byte, or every row once and within 5e-6."""
    _check_manifest(store)
    names = {str(path.relative_to(store)) for path in store.rglob("*")}
    wanted = {str(path.relative_to(reference)) for path in reference.rglob("*")}
    insist(names == wanted, "a finished store holds its files alone", sorted(names ^ wanted))
    manifest = Manifest.from_json((store / "manifest.json").read_bytes())
    if same:
        for name in sorted(wanted - {"manifest.json"}):
            if (reference / name).is_file():
                insist((store / name).read_bytes() == (reference / name).read_bytes(), "every byte is the same:", name)
        left, right = (_without_producers(folder) for folder in (store, reference))
        insist(left == right, "manifests differ in their producers alone", *_first_difference(left, right))
        return
    for name in sorted(name for name in wanted if name.startswith(("tokens/", "final_norm.safetensors"))):
        insist((store / name).read_bytes() == (reference / name).read_bytes(), "every byte is the same:", name)
    for entry in manifest.hook_points:
        for number, shard in enumerate(entry.present):
            rows = RowSet([(shard.first_row, shard.rows)])
            _compare_rows(store / shard.file, reference / shard.file, (entry.point, number), manifest, rows, False)


def _without_producers(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return {name: value for name, value in values.items() if name not in ("producers", "sha256")}


def _first_difference(left: Any, right: Any, at: str = "") -> tuple[Any, ...]:
    if isinstance(left, dict) and isinstance(right, dict):
        for name in left.keys() | right.keys():
            if left.get(name) != right.get(name):
                return _first_difference(left.get(name), right.get(name), f"{at}.{name}")
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            if one != other:
                return _first_difference(one, other, f"{at}[{index}]")
    return at, left, right
