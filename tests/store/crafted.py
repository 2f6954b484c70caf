"""Finished stores straight from arrays, by other means than the package's writer: numpy, json and hashlib."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import FileEntry, HookPointEntry, Part, ShardEntry
from nemo_qwen_hidden.store.format import DTYPES
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.statistics import Accumulator, StoredError

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS = {"float32": "F32", "float16": "F16", "int16": "BF16", "int8": "I8", "int32": "I32", "int64": "I64"}
POINTS = (HookPoint("embed"), HookPoint("resid_post", 0), HookPoint("resid_post", 3), HookPoint("final_norm"))
LENGTHS = (3, 0, 7, 1, 12)
ONE_PART = ((LENGTHS, 5),)
PARTS = ((LENGTHS, 5), ((), 3), ((0, 4), 100), ((6, 1), 2))
EPS = 1e-6
SHAPES = {HookPoint("q", 1): (3, 4), HookPoint("attn_weights", 1): (2, 5), HookPoint("mlp_act", 1): (11,)}
VERSION_2_POINTS = (POINTS[0], *SHAPES, *POINTS[2:])
KEPT = (1, 2, 4, 9, 10, 11, 22, 23, 26, 27, 30, 32, 33)
"""Of the rows of ``PARTS``: of documents some, one or none."""


@dataclass(frozen=True, kw_only=True)
class Crafted:
    """A store and its truth. states: [K, H] of each hook point as it is to be read. token_id, document, position: [N].
    lengths: of all documents. weight: of the final norm, fp32 [H]. kept: [K], the row of each state."""

    path: Path
    manifest: Manifest
    states: dict[HookPoint, torch.Tensor]
    token_id: NDArray[np.int32]
    document: NDArray[np.int64]
    position: NDArray[np.int64]
    lengths: tuple[int, ...]
    weight: torch.Tensor
    kept: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def rows(self) -> int:
        return len(self.token_id)


def craft(
    path: Path,
    *,
    parts: Sequence[tuple[Sequence[int], int]] = ONE_PART,
    dtype: str = "fp32",
    hidden_size: int = 6,
    points: Sequence[HookPoint] = POINTS,
    seed: int = 0,
    final_norm: bool = True,
    values: Callable[[int, int], NDArray[Any]] | None = None,
    model: dict[str, Any] | None = None,
    shapes: Mapping[HookPoint, tuple[int, ...]] | None = None,
    heads: Mapping[HookPoint, tuple[int, ...]] | None = None,
    kept: Sequence[int] | None = None,
    selection: Mapping[str, Any] | None = None,
    pooling: str | None = None,
) -> Crafted:
    """Makes a store at ``path``.

    Args:
        parts: for each, the lengths of its documents and the rows of a shard. values: gives [rows, hidden_size] of a
            hook point; random ones by default. shapes: of a state, [hidden_size] by default. kept: the rows of the
            store that keep their states, all by default: the states are those of the full store, cut afterwards.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    (path / "tokens").mkdir()
    lengths = tuple(length for documents, _ in parts for length in documents)
    total = sum(lengths)
    token_id = rng.integers(0, 1000, total, dtype=np.int32)
    rows = np.arange(total) if kept is None else np.array(kept, np.int64)
    made = list(_parts(path, parts, token_id, None if kept is None else rows, selection))
    entries, states = [], {}
    for point in points:
        shape = (shapes or {}).get(point, (hidden_size,))
        given = rng.standard_normal((total, prod(shape))) if values is None else values(total, prod(shape))
        stored, scale, states[point] = _encode(given.astype(np.float32)[rows], dtype)
        (path / str(point)).mkdir()
        entry = HookPointEntry.of(point, num_layers=4, shards=0, shape=shape, heads=(heads or {}).get(point))
        shards = tuple(_shards(path, point, entry.norm, made, dtype, stored, scale))
        entries.append(HookPointEntry(**(vars(entry) | {"shards": shards})))
    weight = rng.standard_normal(hidden_size).astype(np.float32)
    norm = _save(path, "final_norm.safetensors", {"weight": weight}, {"eps": f"{EPS:g}"}) if final_norm else None
    manifest = Manifest(
        hidden_size=hidden_size,
        compute_dtype="fp32",
        stored_dtype=dtype,
        hook_points=tuple(entries),
        parts=tuple(made),
        pooling=pooling,
        final_norm=norm,
        model=model or {"path": "tiny", "num_layers": 4},
        producers=({"layout": {"tp": 1}, "versions": {"torch": "2.13"}},),
    )
    (path / "manifest.json").write_bytes(manifest.to_json())
    return Crafted(
        path=path,
        manifest=manifest,
        states=states,
        token_id=token_id,
        document=np.repeat(np.arange(len(lengths)), lengths),
        position=np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in lengths)]),
        lengths=lengths,
        weight=torch.from_numpy(weight),
        kept=rows,
    )


def craft_version_2(path: Path, **changes: Any) -> Crafted:
    """``craft`` with everything that version 2 of the format adds."""
    given: dict[str, Any] = {
        "parts": PARTS,
        "points": VERSION_2_POINTS,
        "shapes": SHAPES,
        "heads": {HookPoint("attn_weights", 1): (2, 0)},
        "kept": KEPT,
        "selection": {"every": 3, "spans": [[1, 2]]},
        "pooling": "last",
    }
    return craft(path, **(given | changes))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of a store, and its digest with it, as whoever means harm would."""
    fields = json.loads((path / "manifest.json").read_text())
    change(fields)
    blank = json.dumps(fields | {"sha256": "0" * 64}).encode()
    (path / "manifest.json").write_bytes(blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1))


def _parts(
    path: Path,
    parts: Sequence[tuple[Sequence[int], int]],
    token_id: NDArray[np.int32],
    kept: NDArray[np.int64] | None,
    selection: Mapping[str, Any] | None,
) -> Any:
    row = document = 0
    for number, (lengths, shard_rows) in enumerate(parts):
        rows = sum(lengths)
        bounds = np.cumsum((0, *lengths))
        inside = None if kept is None else kept[(row <= kept) & (kept < row + rows)] - row
        columns = {
            "document_first_row": bounds.astype(np.int64),
            **({} if inside is None else {"kept": inside}),
            "token_id": token_id[row : row + rows],
            "document": np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
            "position": (np.arange(rows) - np.repeat(bounds[:-1], lengths)).astype(np.int32),
        }
        lines = ""
        for index, (start, stop) in enumerate(pairwise(bounds.tolist())):
            digest = hashlib.sha256(columns["token_id"][start:stop].tobytes()).hexdigest()
            fields = {"id": f"doc-{document + index}", "source": f"file {document + index}.txt", "rows": stop - start}
            lines += json.dumps(fields | {"sha256": digest}) + "\n"
        yield Part(
            first_row=row,
            rows=rows,
            first_document=document,
            documents=len(lengths),
            shard_rows=shard_rows,
            tokens=_save(path, f"tokens/{number:06d}.safetensors", columns, {}),
            lines=_write(path, f"tokens/{number:06d}.documents.jsonl", lines.encode()),
            kept=None if inside is None else len(inside),
            selection=selection,
        )
        row, document = row + rows, document + len(lengths)


def _encode(values: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], NDArray[np.float32] | None, torch.Tensor]:
    """As stored, the scale, and as read."""
    if dtype == "int8":
        scale = np.abs(values).max(axis=1, initial=0.0).astype(np.float32) / np.float32(127)
        numbers = np.rint(values / np.where(scale == 0, 1, scale)[:, None]).astype(np.int8)
        return numbers, scale, torch.from_numpy(numbers.astype(np.float32) * scale[:, None])
    tensor = torch.from_numpy(values).to(TORCH[dtype])
    return tensor.view(torch.int16).numpy() if dtype == "bf16" else tensor.numpy(), None, tensor


def _shards(
    path: Path,
    point: HookPoint,
    norm: str,
    parts: Sequence[Part],
    dtype: str,
    stored: NDArray[Any],
    scale: NDArray[np.float32] | None,
) -> Any:
    number, begins = 0, accumulate((part.states for part in parts), initial=0)
    for part, begin in zip(parts, begins, strict=False):
        for first in range(begin, begin + part.states, part.shard_rows):
            states = slice(first, min(first + part.shard_rows, begin + part.states))
            block, factor = stored[states], None if scale is None else scale[states]
            accumulator = Accumulator(stored.shape[1])
            accumulator.add(_as_float64(block, dtype, factor))
            statistics, sums = accumulator.result()
            tensors = {str(point): block, **({} if factor is None else {"scale": factor})}
            tensors |= {"statistics.moments": sums.moments, "statistics.norms": sums.norms}
            metadata = {
                "hook_point": str(point),
                "norm": norm,
                "part": part.tokens.sha256,
                "first_row": str(first - begin),
                "rows": str(len(block)),
            }
            saved = _save(path, f"{point}/{number:06d}.safetensors", tensors, metadata)
            yield ShardEntry(
                file=saved.file,
                first_row=first,
                rows=len(block),
                bytes=saved.bytes,
                sha256=saved.sha256,
                statistics=statistics,
                error=None if dtype == "fp32" else StoredError(rows=len(block), units=number, max=number / 1000),
            )
            number += 1


def _as_float64(block: NDArray[Any], dtype: str, scale: NDArray[np.float32] | None) -> NDArray[np.float64]:
    if dtype == "bf16":
        return torch.from_numpy(block).view(torch.bfloat16).double().numpy()
    if scale is not None:
        return (block.astype(np.float32) * scale[:, None]).astype(np.float64)
    return block.astype(np.float64)


def _save(path: Path, name: str, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> FileEntry:
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for tensor, array in tensors.items():
        stop = len(data) + array.nbytes
        header[tensor] = {
            "dtype": SAFETENSORS[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), stop],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return _write(path, name, len(text).to_bytes(8, "little") + text + data)


def _write(path: Path, name: str, data: bytes) -> FileEntry:
    (path / name).write_bytes(data)
    return FileEntry(file=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


assert set(DTYPES) == {*TORCH, "int8"}, "a stored dtype that these stores lack"
