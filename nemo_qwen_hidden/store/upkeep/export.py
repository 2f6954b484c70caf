"""A store in the forms of other tools: ``.npy`` arrays, or Parquet. Memory stays the same whatever the size.

Legend: K states of the store, n states of a block, H numbers in each.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.files import naming_full_disk, sync_folder
from nemo_qwen_hidden.store.format import human_bytes
from nemo_qwen_hidden.store.read.reader import Store, open_store
from nemo_qwen_hidden.store.read.views import HookPointView
from nemo_qwen_hidden.store.upkeep.checked import BytesReport, no_report

FORMATS = ("parquet", "npy")
OUT = "--out"
DESCRIPTION = "export.json"
BLOCK_BYTES = 1 << 25
FILE_BYTES = 1 << 30
_TOKEN_BYTES = {"npy": 12, "parquet": 24}
_NUMPY = {torch.float32: np.dtype("<f4"), torch.float16: np.dtype("<f2")}
_ROW, _TOKENS = "row", ("token_id", "document", "position")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """states: whose values are in it. files, bytes: of the folder. dtype: of the values in it, as numpy calls it."""

    path: Path
    states: int
    files: int
    bytes: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is exported, and in which blocks of states."""

    store: Store
    views: dict[str, HookPointView]
    dtype: np.dtype[Any]
    block_states: int
    file_states: int
    done: Callable[[int], None]

    def blocks(self, start: int, stop: int) -> Iterator[range]:
        for state in range(start, stop, self.block_states):
            yield range(state, min(state + self.block_states, stop))

    def values(self, name: str, states: range) -> NDArray[Any]:
        """[n, H]"""
        values = self.store.read(states, [self.views[name]])[name]
        if values.dtype not in _NUMPY or _NUMPY[values.dtype] != self.dtype:
            values = values.float()
        found: NDArray[Any] = values.numpy().astype(self.dtype, copy=False)
        self.done(found.nbytes)
        return found

    def tokens(self, name: str, states: range) -> NDArray[Any]:
        """[n], a column of the token table, of the rows of these states; ``row``: these themselves."""
        rows = self.store.row_of_states(states)
        return rows if name == _ROW else np.asarray(getattr(self.store.tokens, name)[rows])


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    hook_points: Sequence[str] | None = None,
    float32: bool = False,
    report: BytesReport = no_report,
    block_bytes: int = BLOCK_BYTES,
    file_bytes: int = FILE_BYTES,
) -> Exported:
    """Writes the store at ``path`` to a new folder ``out``, which appears when all of it is there.

    ``npy``: an array ``HOOK_POINT.npy`` [K, *shape] of each hook point, with the axes of a state; ``token_id.npy``,
    ``document.npy`` and ``position.npy`` [K], and ``row.npy`` [K] of a store that keeps some rows alone;
    ``documents.jsonl`` with id, source, first row and rows of each document. ``parquet``: files ``data-00000.parquet``
    with the columns ``row``, ``token_id``, ``document``, ``position``, ``document_id`` and one for each hook point,
    lists of H values. Both: ``export.json``, which says what each hook point is.

    Values are float16 where the store holds fp16, and float32 else: numpy has no bf16, and int8 is read with its scale.

    Args:
        to: one of ``FORMATS``. hook_points: names, by default all. float32: also where the store holds fp16.
        report: called with the bytes of values that are done, and all there are.
        block_bytes: about how much is held in memory, and a row group's size. file_bytes: about a Parquet file's size.

    Raises:
        StoreNotFoundError: there is no finished store. StoreError: it is damaged or lacks a hook point; ``out`` is
        there, or cannot be made; or no space is left. Nothing is left of it then.
    """
    if to not in FORMATS:
        raise StoreError("--to", f"must be one of {', '.join(FORMATS)}", to)
    store, folder = open_store(path), Path(out)
    views = store.views(hook_points)
    half = store.dtype == torch.float16 and not float32
    dtype = np.dtype("<f2" if half else "<f4")
    widths = [view.shape[1] for view in views.values()]
    state_bytes = sum(widths) * dtype.itemsize
    if os.path.lexists(folder):
        raise StoreError(OUT, "must not be there yet", str(folder))
    _check_space(folder, store.states * (state_bytes + _TOKEN_BYTES[to]))
    total, so_far = store.states * state_bytes, 0

    def done(size: int) -> None:
        nonlocal so_far
        so_far += size
        report(so_far, total)

    in_block = state_bytes if to == "parquet" else max(widths, default=1) * dtype.itemsize
    job = _Job(
        store=store,
        views=views,
        dtype=dtype,
        block_states=max(1, block_bytes // max(1, in_block)),
        file_states=max(1, file_bytes // max(1, state_bytes)),
        done=done,
    )
    with _appearing(folder) as made:
        files = (_write_npy if to == "npy" else _write_parquet)(job, made)
        _write(made / DESCRIPTION, [json.dumps(_description(job, to, files), indent=2).encode() + b"\n"])
        sizes = [file.stat().st_size for file in made.iterdir()]
    return Exported(path=folder, states=store.states, files=len(sizes), bytes=sum(sizes), dtype=dtype.name)


def _write_npy(job: _Job, folder: Path) -> dict[str, list[str]]:
    """The files of each hook point, by its name."""
    states = job.store.states
    for name, view in job.views.items():
        blocks = (job.values(name, block) for block in job.blocks(0, states))
        _write_array(folder / f"{name}.npy", job.dtype, (states, *view.state_shape), blocks)
    for name in _TOKENS if job.store.tokens.full else (_ROW, *_TOKENS):
        dtype = job.tokens(name, range(0)).dtype.newbyteorder("<")
        blocks = (job.tokens(name, block) for block in job.blocks(0, states))
        _write_array(folder / f"{name}.npy", dtype, (states,), blocks)
    _write(folder / "documents.jsonl", map(_document_line, map(job.store.document, range(job.store.documents))))
    return {name: [f"{name}.npy"] for name in job.views}


def _document_line(document: Any) -> bytes:
    fields = {"id": document.id, "source": document.source, "first_row": document.rows.start, "rows": len(document)}
    return json.dumps(fields).encode() + b"\n"


def _write_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterator[NDArray[Any]]) -> None:
    """One after the other: through a memory map, a full disk would end the process instead of being an error."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with _created(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)


def _write_parquet(job: _Job, folder: Path) -> dict[str, list[str]]:
    """The files of each hook point, by its name: all of them, since each holds every hook point."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, files = _schema(job), []
    values = [f"{name}.list.element" for name in job.views]
    starts = range(0, max(1, job.store.states), job.file_states)
    for number, start in enumerate(starts):
        files.append(f"data-{number:05d}.parquet")
        with (
            _created(folder / files[-1]) as file,
            pq.ParquetWriter(
                file,
                schema,
                compression={name: "NONE" if name in values else "SNAPPY" for name in [*schema.names[:5], *values]},
                use_dictionary=["document_id"],
                write_statistics=["row", "token_id", "document"],
            ) as writer,
        ):
            for states in job.blocks(start, min(start + job.file_states, job.store.states)):
                writer.write_table(pa.table(_columns(job, states, schema), schema=schema), row_group_size=len(states))
    return {name: files for name in job.views}


def _schema(job: _Job) -> Any:
    import pyarrow as pa

    number = pa.float16() if job.dtype == np.float16 else pa.float32()
    document = pa.int64() if np.dtype(job.store.tokens.document.dtype).itemsize == 8 else pa.int32()
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("document", document, nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
    ]
    for name, view in job.views.items():
        labels = {label: str(value) for label, value in _labels(job, view).items() if value is not None}
        fields.append(pa.field(name, pa.list_(number, view.shape[1]), nullable=False, metadata=labels))
    return pa.schema(fields)


def _columns(job: _Job, states: range, schema: Any) -> list[Any]:
    import pyarrow as pa

    document = job.tokens("document", states)
    numbers, places = np.unique(document, return_inverse=True)
    ids = pa.array([job.store.tokens.document_info(int(number)).id for number in numbers], pa.string())
    columns = [pa.array(job.tokens(name, states)) for name in (_ROW, *_TOKENS)]
    columns.append(ids.take(pa.array(places)))
    for name in job.views:
        flat = pa.array(job.values(name, states).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=schema.field(name).type))
    return columns


def _description(job: _Job, to: str, files: dict[str, list[str]]) -> dict[str, Any]:
    manifest = job.store.manifest
    return {
        "format": to,
        "store": str(job.store.path),
        "rows": job.store.rows,
        "states": job.store.states,
        "pooling": manifest.pooling,
        "documents": job.store.documents,
        "hidden_size": job.store.hidden_size,
        "dtypes": {"compute": manifest.compute_dtype, "stored": manifest.stored_dtype, "here": job.dtype.name},
        "hook_points": [{"name": name, "files": files[name], **_labels(job, view)} for name, view in job.views.items()],
        "model": dict(manifest.model),
        "tokenizer": dict(manifest.tokenizer),
    }


def _labels(job: _Job, view: HookPointView) -> dict[str, Any]:
    entry = next(entry for entry in job.store.manifest.hook_points if entry.point == view.hook_point)
    return {
        "shape": list(entry.shape),
        "heads": entry.heads and list(entry.heads),
        "meaning": entry.meaning,
        "norm": entry.norm,
        "huggingface_index": entry.huggingface_index,
    }


def _write(path: Path, pieces: Any) -> None:
    with _created(path) as file:
        for piece in pieces:
            file.write(piece)


@contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """A new file, durable when the block ends."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own when the block ends and goes where it raises."""
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    with ExitStack() as stack:
        with _naming(folder):
            made.mkdir(parents=True)
        stack.callback(shutil.rmtree, made)
        with _naming(folder):
            yield made
            sync_folder(made)
            if os.path.lexists(folder):  # made by someone else meanwhile; an empty one would be replaced
                raise StoreError(OUT, "must not be there yet", str(folder))
            os.rename(made, folder)
        stack.pop_all()
        sync_folder(folder.parent)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turns what the file system says about ``folder`` into a StoreError."""
    try:
        with naming_full_disk(folder, folder.name):
            yield
    except StoreError as error:
        if error.setting != "store.path":
            raise
        raise StoreError(OUT, error.rule, error.value) from error
    except OSError as error:
        rule = f"must be a folder that can be made and written ({error.strerror})"
        raise StoreError(OUT, rule, str(folder)) from error


def _check_space(folder: Path, needed_bytes: int) -> None:
    existing = folder.absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        rule = f"must be on a disk with {human_bytes(needed_bytes)} free, and {human_bytes(free)} are free there"
        raise StoreError(OUT, rule, str(folder))
