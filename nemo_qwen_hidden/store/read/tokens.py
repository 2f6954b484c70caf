"""The token tables: for each row its token, document and position; for each document its id, source and rows; and which
rows have states.

A row is a token by its number. A state is what is stored of a row, by its number in the arrays of the hook points:
states are those of the kept rows, in order. In a full store, where every row is kept, both numbers are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import Part
from nemo_qwen_hidden.store.fields import Fields, load_json
from nemo_qwen_hidden.store.read.columns import JoinedColumn
from nemo_qwen_hidden.store.read.rows import Rows, Several, resolve
from nemo_qwen_hidden.store.read.source import Column, Folder, Source
from nemo_qwen_hidden.store.table import COLUMNS, FIRST_ROW, KEPT, WEIGHT

_SCAN_BYTES = 1 << 22
_INT32: np.dtype[Any] = np.dtype(np.int32)


class RowNotKeptError(StoreError, IndexError):
    """The store holds no state of this row."""


@dataclass(frozen=True, kw_only=True)
class DocumentInfo:
    """id: as the data gave it. source: the file it came from. rows: number of its tokens. sha256: of its token ids
    as little-endian int32."""

    id: str
    source: str
    rows: int
    sha256: str


class PartTokens:
    """Reads the token table of one part, finished or not the store around it; columns are memory maps where the store
    is a folder. Rows, states and documents are counted from 0 in the part.

    Args:
        source: the store's files, or its folder.
        part: what the manifest says of the table, checked against the files.

    Raises:
        StoreError: a file is missing or not what it should be; names it.
    """

    def __init__(self, source: Source | Path, part: Part) -> None:
        self._source = _source(source)
        self._file, self._documents_file = part.tokens.file, part.lines.file
        self._lines_bytes = part.lines.bytes
        header, self._columns = self._source.tensors(self._file)
        self._check(part, header.size_bytes)

    @property
    def rows(self) -> int:
        """N."""
        return len(self.token_id)

    @property
    def documents(self) -> int:
        """D."""
        return len(self._columns[FIRST_ROW]) - 1

    @property
    def token_id(self) -> Column:
        """int32 [N rows], the token of each row."""
        return self._columns["token_id"]

    @property
    def document(self) -> Column:
        """int32 [N rows], the document of each row."""
        return self._columns["document"]

    @property
    def position(self) -> Column:
        """int32 [N rows], the place of each row in its document, from 0."""
        return self._columns["position"]

    @cached_property
    def document_first_row(self) -> NDArray[np.int64]:
        """[D + 1 documents], the first row of each; the last entry is N."""
        return np.asarray(self._columns[FIRST_ROW])

    @cached_property
    def kept(self) -> NDArray[np.int64] | None:
        """[K states], the row of each, in ascending order; None where every row has a state."""
        return np.asarray(self._columns[KEPT]) if KEPT in self._columns else None

    @property
    def row_of_state(self) -> Column:
        """int64 [K states], the row of each; of a part whose rows are not all kept."""
        return self._columns[KEPT]

    @property
    def weight(self) -> Column:
        """float32 [N rows], what each row weighs in the mean of its document; of a part whose states are means."""
        return self._columns[WEIGHT]

    @property
    def states(self) -> int:
        """K, or N where every row has a state."""
        return len(self._columns[KEPT]) if KEPT in self._columns else self.rows

    def states_of(self, first_row: int, length: int) -> range:
        """The states of the kept ones among some consecutive rows: of all of them where every row is kept."""
        if self.kept is None:
            return range(first_row, first_row + length)
        start, stop = np.searchsorted(self.kept, (first_row, first_row + length)).tolist()
        return range(start, stop)

    def kept_rows(self, first_row: int, length: int) -> NDArray[np.int64]:
        """int64, the kept ones among some consecutive rows.

        Raises:
            StoreError: they do not ascend there.
        """
        states = self.states_of(first_row, length)
        if self.kept is None:
            return np.arange(states.start, states.stop)
        rows = np.array(self.kept[states.start : states.stop])
        if len(rows) and not (first_row <= rows[0] and rows[-1] < first_row + length and (np.diff(rows) > 0).all()):
            file = self._source.name(self._file)
            raise StoreError(f"{file}: {KEPT}", "must ascend", f"not so from {states.start} to {states.stop - 1}")
        return rows

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """[stop - start documents], the number of tokens of documents ``start`` to ``stop``, cut at D."""
        return np.diff(self.document_first_row[start : stop + 1])

    def document_rows(self, document: int) -> range:
        """The rows of ``document``; IndexError where there is none of that number."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} is not one of {self.documents}")
        first, stop = (int(row) for row in self.document_first_row[document : document + 2])
        if not 0 <= first <= stop <= self.rows:
            rule = f"must ascend from 0 to {self.rows}"
            raise StoreError(f"{self._source.name(self._file)}: {FIRST_ROW}[{document}]", rule, (first, stop))
        return range(first, stop)

    def document_info(self, document: int) -> DocumentInfo:
        """Id and source of ``document``; the first call scans the file for line ends, later ones read one line.

        Raises:
            IndexError: there is none of that number.
            StoreError: the line is not what it should be.
        """
        rows = self.document_rows(document)
        lines, starts = self._lines
        start, stop = starts[document : document + 2]
        name = f"{self._source.name(self._documents_file)}: line {document + 1}"
        fields = Fields(load_json(lines[start:stop].tobytes(), name), file=name)
        info = DocumentInfo(
            id=fields.text("id"),
            source=fields.text("source"),
            rows=fields.integer("rows"),
            sha256=fields.text("sha256"),
        )
        if info.rows != len(rows):
            raise fields.error("rows", f"must be {len(rows)}, as {self._file} says", info.rows)
        return info

    @cached_property
    def _lines(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The bytes of the lines, and where each starts."""
        lines = self._source.lines(self._documents_file)
        file = self._source.name(self._documents_file)
        if len(lines) != self._lines_bytes:
            raise StoreError(file, f"must be {self._lines_bytes} bytes long, as the manifest says", len(lines))
        starts = [np.zeros(1, np.int64)]
        for offset in range(0, len(lines), _SCAN_BYTES):
            block = lines[offset : offset + _SCAN_BYTES]
            starts.append(np.flatnonzero(block == ord("\n")) + (offset + 1))
        line_starts = np.concatenate(starts)
        if len(line_starts) != self.documents + 1 or line_starts[-1] != len(lines):
            raise StoreError(file, f"must hold {self.documents} whole lines, one a document", len(line_starts) - 1)
        return lines, line_starts

    def _check(self, part: Part, size_bytes: int) -> None:
        file = self._source.name(self._file)
        layout = {name: (str(column.dtype), column.ndim) for name, column in self._columns.items()}
        expected: dict[str, Any] = {**{name: ("int32", 1) for name in COLUMNS}, FIRST_ROW: ("int64", 1)}
        if part.kept is not None:
            expected[KEPT] = ("int64", 1)
        if part.weighted:
            expected[WEIGHT] = ("float32", 1)
        if layout != expected:
            raise StoreError(file, f"must hold the columns {expected}", layout)
        by_row = [name for name in layout if name not in (KEPT, FIRST_ROW)]
        if any(len(self._columns[name]) != self.rows for name in by_row) or self.documents < 0:
            raise StoreError(file, "must hold columns of one length", {k: len(v) for k, v in self._columns.items()})
        if (part.rows, part.documents) != (self.rows, self.documents):
            rule = f"must hold {part.rows} rows of {part.documents} documents, as the manifest says"
            raise StoreError(file, rule, (self.rows, self.documents))
        if self.states != part.states:
            raise StoreError(f"{file}: {KEPT}", f"must hold {part.states} rows, as the manifest says", self.states)
        if part.tokens.bytes != size_bytes:
            raise StoreError(file, f"must be {part.tokens.bytes} bytes long, as the manifest says", size_bytes)
        ends = (int(self.document_first_row[0]), int(self.document_first_row[-1]))
        if ends != (0, self.rows):
            raise StoreError(f"{file}: {FIRST_ROW}", f"must go from 0 to {self.rows}", ends)


class TokenTable:
    """The token tables of all parts as one: rows, states and documents are counted through. A table is opened, and
    checked, when something of it is asked for.

    Args:
        source: the store's files, or its folder. parts: as the manifest has them.

    Raises (on use):
        StoreError: a file is missing or not what it should be; names it.
    """

    def __init__(self, source: Source | Path, parts: Sequence[Part]) -> None:
        self._source, self._parts = _source(source), tuple(parts)
        self._opened: dict[int, PartTokens] = {}
        self._first_rows = [0, *accumulate(part.rows for part in self._parts)]
        self._first_states = [0, *accumulate(part.states for part in self._parts)]
        self._first_documents = [0, *accumulate(part.documents for part in self._parts)]

    @property
    def rows(self) -> int:
        """N."""
        return self._first_rows[-1]

    @property
    def documents(self) -> int:
        """D."""
        return self._first_documents[-1]

    @property
    def token_id(self) -> Column:
        """int32 [N rows], the token of each row."""
        return self._column("token_id")

    @property
    def document(self) -> Column:
        """int32 [N rows], the document of each row; int64 where D needs it."""
        wide = self.documents > np.iinfo(np.int32).max
        return self._column("document", self._first_documents[:-1], np.dtype(np.int64 if wide else np.int32))

    @property
    def position(self) -> Column:
        """int32 [N rows], the place of each row in its document, from 0."""
        return self._column("position")

    @property
    def states(self) -> int:
        """K, the number of kept rows; N in a full store."""
        return self._first_states[-1]

    @cached_property
    def full(self) -> bool:
        """Whether every row has a state, so that its number is the row's."""
        return all(part.kept is None for part in self._parts)

    def states_of(self, first_row: int, length: int) -> range:
        """The states of the kept ones among some consecutive rows; in a full store these rows themselves.

        Raises:
            IndexError: there are no such rows.
        """
        if not 0 <= first_row <= first_row + length <= self.rows:
            raise IndexError(f"rows {first_row} to {first_row + length - 1} do not lie within {self.rows}")
        if self.full:
            return range(first_row, first_row + length)
        return range(self._states_before(first_row), self._states_before(first_row + length))

    def kept_rows(self, first_row: int, length: int) -> NDArray[np.int64]:
        """int64, the kept ones among some consecutive rows, in order; IndexError where there are no such rows."""
        return self.row_of_states(self.states_of(first_row, length))

    @overload
    def row_of_states(self, states: int) -> int: ...
    @overload
    def row_of_states(self, states: Several) -> NDArray[np.int64]: ...
    def row_of_states(self, states: Rows) -> int | NDArray[np.int64]:
        """The rows of states, given by anything that a view takes: int64 [n], or an int for one; IndexError where
        there is no such state."""
        chosen = resolve(states, self.states, "state")
        if self.full:
            return chosen if isinstance(chosen, int) else np.asarray(chosen, np.int64)
        rows: NDArray[np.int64] = self._row_of_state[chosen]
        if np.size(rows) and not (np.min(rows) >= 0 and np.max(rows) < self.rows):
            rule = f"must hold rows from 0 to {self.rows - 1}"
            raise StoreError(f"{self._source.location}: {KEPT}", rule, f"{np.min(rows)} to {np.max(rows)}")
        return int(rows) if isinstance(chosen, int) else rows

    @overload
    def state_of_rows(self, rows: int) -> int: ...
    @overload
    def state_of_rows(self, rows: Several) -> NDArray[np.int64]: ...
    def state_of_rows(self, rows: Rows) -> int | NDArray[np.int64]:
        """The states of rows, given by anything that a view takes: int64 [n], or an int for one.

        Raises:
            IndexError: there is no such row. RowNotKeptError: one has no state; names it.
        """
        chosen = resolve(rows, self.rows)
        if self.full:
            return chosen if isinstance(chosen, int) else np.asarray(chosen, np.int64)
        wanted = np.atleast_1d(np.asarray(chosen, np.int64))
        found = np.empty(len(wanted), np.int64)
        parts = np.searchsorted(self._first_rows, wanted, side="right") - 1
        for part in np.unique(parts).tolist():
            here = parts == part
            kept, inside = self.part(part).kept, wanted[here] - self._first_rows[part]
            assert kept is not None, "a manifest has kept rows in all parts or in none"
            places = np.searchsorted(kept, inside)
            absent = places == len(kept)
            absent[~absent] = kept[places[~absent]] != inside[~absent]
            if absent.any():
                rule = f"must be one whose state the store keeps ({self.states} of {self.rows} rows)"
                raise RowNotKeptError("row", rule, int(wanted[here][absent][0]))
            found[here] = places + self._first_states[part]
        return int(found[0]) if isinstance(chosen, int) else found

    def part(self, index: int) -> PartTokens:
        """The token table of one part."""
        if index not in self._opened:
            self._opened[index] = PartTokens(self._source, self._parts[index])
        return self._opened[index]

    def document_rows(self, document: int) -> range:
        """The rows of ``document``; IndexError where there is none of that number."""
        part, inside = self._part_of(document)
        rows, first_row = self.part(part).document_rows(inside), self._first_rows[part]
        return range(first_row + rows.start, first_row + rows.stop)

    def document_info(self, document: int) -> DocumentInfo:
        """Id and source of ``document``; the first call in a part scans a file for line ends.

        Raises:
            IndexError: there is none of that number.
            StoreError: the line is not what it should be.
        """
        part, inside = self._part_of(document)
        return self.part(part).document_info(inside)

    def document_states(self, document: int) -> range:
        """The states of the kept rows of ``document``; IndexError where there is none of that number."""
        rows = self.document_rows(document)
        return self.states_of(rows.start, len(rows))

    @cached_property
    def weight(self) -> JoinedColumn:
        """float32 [N rows], what each row weighs in the mean of its document; of a store whose states are means."""
        columns = [partial(self._column_of, part, "weight") for part in range(len(self._parts))]
        return JoinedColumn(columns, self._first_rows, dtype=np.dtype(np.float32))

    @cached_property
    def _row_of_state(self) -> JoinedColumn:
        columns = [partial(self._column_of, part, "row_of_state") for part in range(len(self._parts))]
        return JoinedColumn(columns, self._first_states, added=self._first_rows[:-1], dtype=np.dtype(np.int64))

    def _states_before(self, row: int) -> int:
        """How many rows before ``row`` are kept."""
        part = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        inside = row - self._first_rows[part]
        return self._first_states[part] + (self.part(part).states_of(0, inside).stop if inside else 0)

    def _part_of(self, document: int) -> tuple[int, int]:
        """The part of a document, and its number there."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} is not one of {self.documents}")
        part = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        return part, document - self._first_documents[part]

    def _column(self, name: str, added: Sequence[int] = (), dtype: np.dtype[Any] = _INT32) -> Column:
        if len(self._parts) == 1:
            return self._column_of(0, name)
        columns = [partial(self._column_of, part, name) for part in range(len(self._parts))]
        return JoinedColumn(columns, self._first_rows, added=added, dtype=dtype)

    def _column_of(self, part: int, name: str) -> Column:
        column: Column = getattr(self.part(part), name)
        return column


def _source(given: Source | Path) -> Source:
    return Folder(given) if isinstance(given, Path) else given
