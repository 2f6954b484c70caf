"""What the tests of the store share: a small store made the way the extractor makes one, and single steps of it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store import session
from nemo_qwen_hidden.store.entries import HookPointEntry, TokenPart
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.token_writer import TokenTableWriter
from nemo_qwen_hidden.store.writer import ShardWriter

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (3, 0, 7, 1, 12)
ROWS = sum(LENGTHS)
POINTS = (HookPoint("embed"), HookPoint("resid_post", 0), HookPoint("resid_post", 3), HookPoint("final_norm"))
POINT, FINAL = POINTS[2:]


@dataclass(frozen=True)
class Run:
    first_row: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished store and its truth. states: [N, H] of each hook point, in the stored dtype."""

    path: Path
    manifest: Manifest
    states: dict[HookPoint, torch.Tensor]
    token_ids: NDArray[np.int32]


def random_states(rows: int, hidden_size: int, dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, hidden_size, generator=generator).to(TORCH[dtype])


def write_tokens(folder: Path, lengths: tuple[int, ...]) -> tuple[TokenPart, NDArray[np.int32]]:
    token_ids = np.random.default_rng(7).integers(0, 1000, sum(lengths), dtype=np.int32)
    bounds = np.cumsum((0, *lengths)).tolist()
    with TokenTableWriter(folder) as writer:
        for index, (start, stop) in enumerate(pairwise(bounds)):
            writer.append(document_id=f"doc-{index}", source=f"file {index}.txt", token_ids=token_ids[start:stop])
    return writer.close(), token_ids


def draft(part: TokenPart, **changes: Any) -> Manifest:
    """A manifest without shards."""
    fields: dict[str, Any] = {
        "rows": part.rows,
        "documents": part.documents,
        "hidden_size": 6,
        "shard_rows": 5,
        "compute_dtype": "fp32",
        "stored_dtype": "fp32",
        "hook_points": tuple(HookPointEntry.of(point, num_layers=4) for point in POINTS),
        "tokens": (part,),
        "model": {"path": "tiny", "num_layers": 4},
        "producer": {"layout": "tp=1 pp=1 dp=1 sp=false", "versions": {"torch": "2.13"}},
    }
    return Manifest(**(fields | changes))


def make_store(path: Path, *, lengths: tuple[int, ...] = LENGTHS, **changes: Any) -> Made:
    session.begin(path, {"command": "test"}, overwrite=False)
    part, token_ids = write_tokens(path, lengths)
    manifest = draft(part, **changes)
    states = {
        entry.point: random_states(part.rows, manifest.hidden_size, manifest.stored_dtype, seed)
        for seed, entry in enumerate(manifest.hook_points)
    }
    with ShardWriter(
        path,
        hook_points=states,
        rows=part.rows,
        hidden_size=manifest.hidden_size,
        dtype=manifest.stored_dtype,
        shard_rows=manifest.shard_rows,
    ) as writer:
        for point, values in states.items():
            writer.write(point, [Run(first_row=0, length=part.rows)], values)
    manifest = session.finish(path, manifest, written=writer.written)
    return Made(path=path, manifest=manifest, states=states, token_ids=token_ids)


def writer(folder: Path, **changes: Any) -> ShardWriter:
    fields: dict[str, Any] = {
        "hook_points": [POINT, FINAL],
        "rows": 12,
        "hidden_size": 3,
        "dtype": "fp32",
        "shard_rows": 5,
    }
    return ShardWriter(folder, **(fields | changes))


def states(rows: int = 12, hidden_size: int = 3) -> torch.Tensor:
    return torch.arange(rows * hidden_size, dtype=torch.float32).reshape(rows, hidden_size) + 1


def stored(folder: Path, point: HookPoint = POINT) -> torch.Tensor:
    """What the library reads from all shards of ``point``."""
    parts = []
    for path in sorted((folder / str(point)).iterdir()):
        assert path.name.endswith(".safetensors.partial")
        parts.append(load_file(path)[str(point)])
    return torch.cat(parts)


def begin(path: Path, *, overwrite: bool = False) -> None:
    session.begin(path, {"command": "test"}, overwrite=overwrite)


def unfinished(path: Path, write: bool = True) -> Path:
    """A store under construction with one shard of one hook point."""
    begin(path)
    (path / "tokens").mkdir()
    (path / "tokens/000000.token_id.tmp").write_bytes(b"1234")
    if write:
        point = HookPoint("embed")
        with ShardWriter(path, hook_points=[point], rows=3, hidden_size=2, dtype="fp32", shard_rows=5):
            (path / "embed/000000.safetensors.partial").write_bytes(b"half")
    return path


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
