"""Writes a token table document by document, in memory that does not grow with them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import TokenPart
from nemo_qwen_hidden.store.files import naming_full_disk, sync_folder
from nemo_qwen_hidden.store.format import TEMPORARY, TOKENS
from nemo_qwen_hidden.store.header import TensorSpec, build_header
from nemo_qwen_hidden.store.tokens import COLUMNS, DOCUMENTS_FILE, FILE, FIRST_ROW

_BUFFER_BYTES = 1 << 20
_MOST_DOCUMENTS = 2**31 - 1


class TokenTableWriter:
    """Takes documents one by one; ``close`` puts the table into the store at ``folder``. Called by one rank.

    How many rows there will be is not known until the end, so columns grow in temporary files beside the table. A
    context manager: it closes, or takes its temporary files away where the block raised.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / TOKENS).mkdir(exist_ok=True)
        prefix = FILE.removesuffix("safetensors")
        self._paths = {name: folder / f"{prefix}{name}{TEMPORARY}" for name in (*COLUMNS, FIRST_ROW)}
        self._paths[DOCUMENTS_FILE] = folder / (DOCUMENTS_FILE + TEMPORARY)
        self._paths[FILE] = folder / (FILE + TEMPORARY)
        self._files: dict[str, BinaryIO] = {}
        self._rows = self._documents = 0
        self._part: TokenPart | None = None
        with ExitStack() as stack:
            for name, path in self._paths.items():
                stack.callback(path.unlink, missing_ok=True)
                self._files[name] = stack.enter_context(open(path, "w+b", _BUFFER_BYTES))
            self._temporaries = stack.pop_all()

    def append(self, *, document_id: str, source: str, token_ids: NDArray[np.int32]) -> None:
        """Adds one document; its rows follow those of the document before.

        Args:
            document_id, source: any strings; kept as they are.
            token_ids: int32 [tokens]; may be empty.

        Raises:
            ValueError: token_ids is not a one-dimensional int32 array.
            StoreError: no space is left, and the writer is closed with nothing written; or there are more documents
                than the table can number (2**31 - 1).
        """
        if token_ids.dtype != np.int32 or token_ids.ndim != 1:
            raise ValueError(f"token_ids must be int32 [tokens], but is {token_ids.dtype} {list(token_ids.shape)}")
        if self._documents == _MOST_DOCUMENTS:
            raise StoreError("data.path", f"must hold at most {_MOST_DOCUMENTS} documents", self._documents + 1)
        count = len(token_ids)
        line = json.dumps({"id": document_id, "source": source, "rows": count}) + "\n"
        with self._all_or_nothing():
            self._write("token_id", token_ids)
            self._write("document", np.full(count, self._documents, np.int32))
            self._write("position", np.arange(count, dtype=np.int32))
            self._write(FIRST_ROW, np.array([self._rows], np.int64))
            self._files[DOCUMENTS_FILE].write(line.encode())
        self._rows += count
        self._documents += 1

    def close(self) -> TokenPart:
        """Makes the table durable and says what it is; a second call says it again.

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

    def _write(self, column: str, values: NDArray[np.int32] | NDArray[np.int64]) -> None:
        self._files[column].write(np.ascontiguousarray(values).data)

    def _assemble(self) -> TokenPart:
        self._write(FIRST_ROW, np.array([self._rows], np.int64))
        tensors = {FIRST_ROW: TensorSpec(dtype="I64", shape=(self._documents + 1,))}  # first: keeps it aligned to 8
        tensors |= {name: TensorSpec(dtype="I32", shape=(self._rows,)) for name in COLUMNS}
        start, header = build_header(tensors, {"first_row": "0", "first_document": "0"})
        table, lines = self._files[FILE], self._files[DOCUMENTS_FILE]
        table.write(start)
        for name in tensors:
            self._files[name].seek(0)
            shutil.copyfileobj(self._files[name], table, _BUFFER_BYTES)
        for file in (table, lines):
            file.flush()
            os.fsync(file.fileno())
        for name in (DOCUMENTS_FILE, FILE):
            os.replace(self._paths[name], self._folder / name)
        sync_folder(self._folder / TOKENS)
        return TokenPart(
            file=FILE,
            documents_file=DOCUMENTS_FILE,
            first_row=0,
            rows=self._rows,
            first_document=0,
            documents=self._documents,
            bytes=header.size_bytes + lines.tell(),
        )

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
