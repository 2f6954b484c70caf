"""What the tests of the store share: a small store made the way the extractor makes one, and single steps of it."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.entries import FileEntry, HookPointEntry, Part
from nemo_qwen_hidden.store.format import JOURNAL, TOKENS, Shard
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.write import place, session
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter
from nemo_qwen_hidden.store.write.writer import ShardWriter

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (3, 0, 7, 1, 12)
ROWS = sum(LENGTHS)
LAYERS = 4
POINTS = (HookPoint("embed"), HookPoint("resid_post", 0), HookPoint("resid_post", 3), HookPoint("final_norm"))
POINT, FINAL = POINTS[2:]


@dataclass(frozen=True)
class Run:
    first_row: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished store and its truth. states: [N, H] of each hook point: in the stored dtype, or as they were before
    they were stored where that is int8."""

    path: Path
    manifest: Manifest
    states: dict[HookPoint, torch.Tensor]
    token_ids: NDArray[np.int32]


def random_states(rows: int, hidden_size: int, dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, hidden_size, generator=generator).to(TORCH.get(dtype, torch.float32))


def write_tokens(
    folder: Path, lengths: tuple[int, ...], *, shard_rows: int = 5, part: int = 0, seed: int = 7
) -> tuple[Part, NDArray[np.int32]]:
    """The token table of documents of these lengths, numbered on from part to part."""
    token_ids = np.random.default_rng(seed + part).integers(0, 1000, sum(lengths), dtype=np.int32)
    bounds = np.cumsum((0, *lengths)).tolist()
    with TokenTableWriter(folder, shard_rows=shard_rows, part=part) as writer:
        for index, (start, stop) in enumerate(pairwise(bounds)):
            name = f"doc-{index}" if not part else f"doc-{part}-{index}"
            writer.append(document_id=name, source=f"file {index}.txt", token_ids=token_ids[start:stop])
    return writer.close(), token_ids


def empty_part(rows: int, *, shard_rows: int = 5, first_row: int = 0) -> Part:
    """One document, of whose token table only the manifest knows."""
    file = FileEntry(file=f"{TOKENS}/{first_row:06d}.safetensors", bytes=0, sha256="0" * 64)
    lines = FileEntry(file=f"{TOKENS}/{first_row:06d}.documents.jsonl", bytes=0, sha256="0" * 64)
    sizes = {"rows": rows, "documents": 1, "shard_rows": shard_rows, "first_row": first_row}
    return Part(**sizes, first_document=int(first_row > 0), tokens=file, lines=lines)


def draft(*parts: Part, points: Iterable[HookPoint] = POINTS, **changes: Any) -> Manifest:
    """A manifest without shards."""
    fields: dict[str, Any] = {
        "hidden_size": 6,
        "compute_dtype": "fp32",
        "stored_dtype": "fp32",
        "hook_points": (),
        "parts": parts,
        "model": {"path": "tiny", "num_layers": LAYERS},
        "producers": ({"layout": {"tp": 1, "pp": 1, "dp": 1, "sp": False}, "versions": {"torch": "2.13"}},),
    }
    manifest = Manifest(**(fields | changes))
    if "hook_points" in changes:
        return manifest
    shards = manifest.grid.shards
    return replace(
        manifest,
        hook_points=tuple(
            HookPointEntry.of(point, num_layers=LAYERS, shards=shards, shape=(manifest.hidden_size,))
            for point in points
        ),
    )


def truth(target: Manifest) -> dict[HookPoint, torch.Tensor]:
    """Random states of every hook point."""
    return {
        entry.point: random_states(target.rows, target.hidden_size, target.stored_dtype, seed)
        for seed, entry in enumerate(target.hook_points)
    }


def make_store(path: Path, *, lengths: tuple[int, ...] = LENGTHS, shard_rows: int = 5, **changes: Any) -> Made:
    """``changes``: of the manifest's fields; or ``points``."""
    with place.locked(path):
        with session.staging(path) as staged:
            part, token_ids = write_tokens(staged, lengths, shard_rows=shard_rows)
            target = draft(part, **changes)
            session.start(path, target, {}, staged=staged)
        states = truth(target)
        write_states(path, target, states)
        manifest = finish(path, target)
    return Made(path=path, manifest=manifest, states=states, token_ids=token_ids)


def write_states(
    path: Path, target: Manifest, states: Mapping[HookPoint, torch.Tensor], rows: Iterable[range] | None = None
) -> None:
    """Writes what is missing of some rows, of all by default, durably."""
    _, done = session.progress(path, target)
    with ShardWriter(path, target, rank=0, done=done) as writer:
        for point, values in states.items():
            for run in (range(target.rows),) if rows is None else rows:
                writer.write(point, [Run(run.start, len(run))], values[run.start : run.stop])


def seal_all(path: Path, target: Manifest) -> list[Shard]:
    """Seals every shard that is not sealed yet; says which."""
    record, shards = session.to_seal(path, target)
    session.seal_shards(path, target, shards, record.errors, rank=0)
    return shards


def finish(path: Path, target: Manifest) -> Manifest:
    """What is left to do when all rows are written."""
    seal_all(path, target)
    return session.finish(path, target)


def begin(path: Path, *, fresh: bool = True) -> Manifest:
    """Begins a store of ``LENGTHS`` and leaves it."""
    with place.locked(path), session.staging(path) as staged:
        part, _ = write_tokens(staged, LENGTHS)
        target = draft(part)
        session.start(path, target, {}, fresh=fresh, staged=staged)
    return target


def unfinished(path: Path, *, rows: Iterable[range] = (range(3, 11),)) -> Manifest:
    """A store that a crash has left with these rows of each hook point."""
    target = begin(path)
    write_states(path, target, truth(target), rows)
    return target


def target_of(
    *,
    rows: int = 12,
    hidden_size: int = 3,
    dtype: str = "fp32",
    shard_rows: int = 5,
    points: Sequence[HookPoint] = (POINT, FINAL),
) -> Manifest:
    """What a bare ``writer`` writes."""
    return draft(empty_part(rows, shard_rows=shard_rows), points=points, hidden_size=hidden_size, stored_dtype=dtype)


def writer(
    folder: Path,
    target: Manifest | None = None,
    *,
    rank: int = 0,
    done: Mapping[HookPoint, RowSet] | None = None,
    options: Mapping[str, Any] | None = None,
    **sizes: Any,
) -> ShardWriter:
    """A writer of ``target_of(**sizes)`` in a folder where no session has begun."""
    (folder / JOURNAL).mkdir(exist_ok=True)
    return ShardWriter(folder, target or target_of(**sizes), rank=rank, done=done, **(options or {}))


def states(rows: int = 12, hidden_size: int = 3) -> torch.Tensor:
    return torch.arange(rows * hidden_size, dtype=torch.float32).reshape(rows, hidden_size) + 1


def shard_files(folder: Path, point: HookPoint = POINT) -> list[Path]:
    """The shards of ``point``, all under their temporary names."""
    files = sorted((folder / str(point)).iterdir())
    assert all(path.name.endswith(".safetensors.partial") for path in files)
    return files


def stored(folder: Path, point: HookPoint = POINT, *, tensor: str | None = None) -> torch.Tensor:
    """What the library safetensors reads from all shards of ``point``, under their temporary names."""
    return torch.cat([load_file(path)[tensor or str(point)] for path in shard_files(folder, point)])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` and what it holds; folders and links as names."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.is_file() and not path.is_symlink() else b"<>"
    return found


def python_command(code: str, *arguments: object) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run ``code`` with this checkout's package."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return command, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def python(code: str, *arguments: object, before: Sequence[str] = ()) -> list[str]:
    """The lines that ``code`` prints in a process of its own; ``before``: a command that runs it."""
    command, environment = python_command(code, *arguments)
    done = subprocess.run([*before, *command], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
