"""Writes a token table document by document, in memory that does not grow with them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import FileEntry, Part
from nemo_qwen_hidden.store.files import naming_full_disk, sync_folder
from nemo_qwen_hidden.store.format import TEMPORARY, TOKENS
from nemo_qwen_hidden.store.header import TensorSpec, build_header
from nemo_qwen_hidden.store.table import COLUMNS, FIRST_ROW, KEPT, WEIGHT, lines_name, table_name

_BUFFER_BYTES = 1 << 20
_MOST_DOCUMENTS = 2**31 - 1


class TokenTableWriter:
    """Takes documents one by one; ``close`` puts the table into the store at ``folder``. Called by one rank.

    Args:
        shard_rows: rows of one shard of this part. part: its number; it is numbered from row 0 in any case. durable:
            whether ``close`` returns only when its files are. metadata: of the table's file, which tells it, and so the
            shards that name its SHA-256, from one with the same tokens.

    How many rows there will be is not known until the end, so columns grow in temporary files beside the table. A
    context manager: it closes, or takes its temporary files away where the block raised.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_rows: int,
        part: int = 0,
        durable: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._shard_rows, self._durable = folder, shard_rows, durable
        self._metadata = dict(metadata or {})
        self._table, self._lines = table_name(part), lines_name(part)
        (folder / TOKENS).mkdir(exist_ok=True)
        prefix = self._table.removesuffix("safetensors")
        self._paths = {
            name: folder / f"{prefix}{name}{TEMPORARY}" for name in (*COLUMNS, FIRST_ROW, KEPT, WEIGHT, WEIGHT)
        }
        self._paths |= {name: folder / (name + TEMPORARY) for name in (self._lines, self._table)}
        self._files: dict[str, BinaryIO] = {}
        self._rows = self._documents = self._states = 0
        self._selects: bool | None = None  # as the first document says
        self._weighs: bool | None = None
        self._part: Part | None = None
        with ExitStack() as stack:
            for name, path in self._paths.items():
                stack.callback(path.unlink, missing_ok=True)
                self._files[name] = stack.enter_context(open(path, "w+b", _BUFFER_BYTES))
            self._temporaries = stack.pop_all()

    def append(
        self,
        *,
        document_id: str,
        source: str,
        token_ids: NDArray[np.int32],
        kept: NDArray[np.int64] | None = None,
        weight: NDArray[np.float32] | None = None,
    ) -> None:
        """Adds one document; its rows follow those of the document before.

        Args:
            document_id, source: any strings; kept as they are.
            token_ids: int32 [tokens]; may be empty.
            kept: int64 [kept tokens], the places in the document, in order, of the tokens whose states are stored;
                None where all are. None of all documents, or of none.
            weight: float32 [tokens], what each weighs in the document's mean; of all documents, or of none.

        Raises:
            ValueError: token_ids is not a one-dimensional int32 array, or kept not one of ascending places in it, or
                None of some documents alone.
            StoreError: no space is left, and the writer is closed with nothing written; or there are more documents
                than the table can number (2**31 - 1).
        """
        if token_ids.dtype != np.int32 or token_ids.ndim != 1:
            raise ValueError(f"token_ids must be int32 [tokens], but is {token_ids.dtype} {list(token_ids.shape)}")
        if self._selects not in (None, kept is not None):
            raise ValueError("kept must be given with every document of a part, or with none")
        if kept is not None:
            _check_kept(kept, len(token_ids))
        if self._weighs not in (None, weight is not None):
            raise ValueError("weight must be given with every document of a part, or with none")
        if weight is not None and (weight.dtype != np.float32 or weight.shape != token_ids.shape or kept is None):
            raise ValueError(f"weight must be float32 {list(token_ids.shape)}, beside kept")
        if self._documents == _MOST_DOCUMENTS:
            raise StoreError("data.path", f"must hold at most {_MOST_DOCUMENTS} documents", self._documents + 1)
        count = len(token_ids)
        line = json.dumps({"id": document_id, "source": source, "rows": count, "sha256": _sha256(token_ids)}) + "\n"
        with self._all_or_nothing():
            self._write("token_id", token_ids)
            self._write("document", np.full(count, self._documents, np.int32))
            self._write("position", np.arange(count, dtype=np.int32))
            self._write(FIRST_ROW, np.array([self._rows], np.int64))
            if kept is not None:
                self._write(KEPT, kept + self._rows)
                self._states += len(kept)
            if weight is not None:
                self._write(WEIGHT, weight)
            self._files[self._lines].write(line.encode())
        self._selects, self._weighs = kept is not None, weight is not None
        self._rows += count
        self._documents += 1

    def close(self) -> Part:
        """Makes the table whole and says what it is; a second call says it again.

        Raises:
            StoreError: no space is left; nothing of the table remains.
        """
        if self._part is None:
            with self._all_or_nothing():
                self._part = self._assemble()
            self._temporaries.close()
        return self._part

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()

    def _write(self, column: str, values: NDArray[np.int32] | NDArray[np.int64] | NDArray[np.float32]) -> None:
        self._files[column].write(np.ascontiguousarray(values).data)

    def _assemble(self) -> Part:
        self._write(FIRST_ROW, np.array([self._rows], np.int64))
        tensors = {FIRST_ROW: TensorSpec(dtype="I64", shape=(self._documents + 1,))}  # first: keeps it aligned to 8
        if self._selects:
            tensors[KEPT] = TensorSpec(dtype="I64", shape=(self._states,))
        if self._weighs:
            tensors[WEIGHT] = TensorSpec(dtype="F32", shape=(self._rows,))
        tensors |= {name: TensorSpec(dtype="I32", shape=(self._rows,)) for name in COLUMNS}
        start, _ = build_header(tensors, self._metadata)
        table, lines = self._files[self._table], self._files[self._lines]
        table.write(start)
        for name in tensors:
            self._files[name].seek(0)
            shutil.copyfileobj(self._files[name], table, _BUFFER_BYTES)
        for file in (table, lines):
            file.flush()
            if self._durable:
                os.fsync(file.fileno())
        entries = {name: self._entry(name) for name in (self._table, self._lines)}
        for name in entries:
            os.replace(self._paths[name], self._folder / name)
        if self._durable:
            sync_folder(self._folder / TOKENS)
        return Part(
            first_row=0,
            rows=self._rows,
            first_document=0,
            documents=self._documents,
            shard_rows=self._shard_rows,
            tokens=entries[self._table],
            lines=entries[self._lines],
            kept=self._states if self._selects else None,
            weighted=bool(self._weighs),
        )

    def _entry(self, name: str) -> FileEntry:
        with open(self._paths[name], "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileEntry(file=name, bytes=file.tell(), sha256=digest)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Columns of which some lack a document would be read shifted, so that any error ends the table."""
        try:
            with naming_full_disk(self._folder, "the token table"):
                yield
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        """Closes and deletes the temporary files while another error is on its way up."""
        with suppress(OSError):  # a disk that was full is full again, over bytes that go anyway
            self._temporaries.close()


def _check_kept(kept: NDArray[np.int64], count: int) -> None:
    if kept.dtype != np.int64 or kept.ndim != 1:
        raise ValueError(f"kept must be int64 [kept tokens], but is {kept.dtype} {list(kept.shape)}")
    if len(kept) and not (kept[0] >= 0 and kept[-1] < count and (np.diff(kept) > 0).all()):
        raise ValueError(f"kept must ascend within 0 to {count - 1}, but is {kept}")


def _sha256(token_ids: NDArray[np.int32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(token_ids, "<i4").data).hexdigest()
