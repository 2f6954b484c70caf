"""The token table: for each row its token, document and position; for each document its id, source and rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import TokenPart
from nemo_qwen_hidden.store.fields import Fields, load_json
from nemo_qwen_hidden.store.format import TOKENS
from nemo_qwen_hidden.store.maps import map_bytes, map_tensors

FILE = f"{TOKENS}/000000.safetensors"
DOCUMENTS_FILE = f"{TOKENS}/000000.documents.jsonl"
COLUMNS = ("token_id", "document", "position")
FIRST_ROW = "document_first_row"
_SCAN_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class DocumentInfo:
    """id: as the data gave it. source: the file it came from. rows: number of its tokens."""

    id: str
    source: str
    rows: int


class TokenTable:
    """Reads a token table, finished or not the store around it; columns are memory maps.

    Args:
        folder: the store's folder.
        part: what the manifest says of the table, checked against the files; None while there is no manifest.

    Raises:
        StoreError: a file is missing or not what it should be; names it.
    """

    def __init__(self, folder: Path, part: TokenPart | None = None) -> None:
        self._folder = folder
        self._file = FILE if part is None else part.file
        self._documents_file = DOCUMENTS_FILE if part is None else part.documents_file
        _, self._arrays = map_tensors(folder, self._file)
        self._check(part)
        self._lines: NDArray[np.uint8] | None = None
        self._line_starts: NDArray[np.int64] = np.zeros(0, np.int64)

    @property
    def rows(self) -> int:
        """N."""
        return len(self.token_id)

    @property
    def documents(self) -> int:
        """D."""
        return len(self.document_first_row) - 1

    @property
    def token_id(self) -> NDArray[np.int32]:
        """[N rows], the token of each row."""
        return self._arrays["token_id"]

    @property
    def document(self) -> NDArray[np.int32]:
        """[N rows], the document of each row."""
        return self._arrays["document"]

    @property
    def position(self) -> NDArray[np.int32]:
        """[N rows], the place of each row in its document, from 0."""
        return self._arrays["position"]

    @property
    def document_first_row(self) -> NDArray[np.int64]:
        """[D + 1 documents], the first row of each; the last entry is N."""
        return self._arrays[FIRST_ROW]

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """[stop - start documents], the number of tokens of documents ``start`` to ``stop``, cut at D."""
        return np.diff(self.document_first_row[start : stop + 1])

    def first_row(self, document: int) -> int:
        """The first row of ``document``; IndexError where there is none of that number."""
        return self.document_rows(document).start

    def document_rows(self, document: int) -> range:
        """The rows of ``document``; IndexError where there is none of that number."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} is not one of {self.documents}")
        first, stop = (int(row) for row in self.document_first_row[document : document + 2])
        if not 0 <= first <= stop <= self.rows:
            rule = f"must ascend from 0 to {self.rows}"
            raise StoreError(f"{self._folder / self._file}: {FIRST_ROW}[{document}]", rule, (first, stop))
        return range(first, stop)

    def document_info(self, document: int) -> DocumentInfo:
        """Id and source of ``document``; the first call scans the file for line ends, later ones read one line.

        Raises:
            IndexError: there is none of that number.
            StoreError: the line is not what it should be.
        """
        rows = self.document_rows(document)
        if self._lines is None:
            self._lines = self._map_lines()
        start, stop = self._line_starts[document : document + 2]
        name = f"{self._folder / self._documents_file}: line {document + 1}"
        fields = Fields(load_json(self._lines[start:stop].tobytes(), name), file=name)
        info = DocumentInfo(id=fields.text("id"), source=fields.text("source"), rows=fields.integer("rows"))
        if info.rows != len(rows):
            raise fields.error("rows", f"must be {len(rows)}, as {self._file} says", info.rows)
        return info

    def _map_lines(self) -> NDArray[np.uint8]:
        lines = map_bytes(self._folder, self._documents_file)
        starts = [np.zeros(1, np.int64)]
        for offset in range(0, len(lines), _SCAN_BYTES):
            block = lines[offset : offset + _SCAN_BYTES]
            starts.append(np.flatnonzero(block == ord("\n")) + (offset + 1))
        self._line_starts = np.concatenate(starts)
        if len(self._line_starts) != self.documents + 1 or self._line_starts[-1] != len(lines):
            rule = f"must hold {self.documents} whole lines, one a document"
            raise StoreError(str(self._folder / self._documents_file), rule, len(self._line_starts) - 1)
        return lines

    def _check(self, part: TokenPart | None) -> None:
        file = str(self._folder / self._file)
        layout = {name: (str(array.dtype), array.ndim) for name, array in self._arrays.items()}
        expected: dict[str, Any] = {**{name: ("int32", 1) for name in COLUMNS}, FIRST_ROW: ("int64", 1)}
        if layout != expected:
            raise StoreError(file, f"must hold the columns {expected}", layout)
        if any(len(self._arrays[name]) != self.rows for name in COLUMNS) or not len(self.document_first_row):
            raise StoreError(file, "must hold columns of one length", {k: len(v) for k, v in self._arrays.items()})
        ends = (int(self.document_first_row[0]), int(self.document_first_row[-1]))
        if ends != (0, self.rows):
            raise StoreError(f"{file}: {FIRST_ROW}", f"must go from 0 to {self.rows}", ends)
        if part is not None and (part.rows, part.documents) != (self.rows, self.documents):
            rule = f"must hold {part.rows} rows of {part.documents} documents, as the manifest says"
            raise StoreError(file, rule, (self.rows, self.documents))
