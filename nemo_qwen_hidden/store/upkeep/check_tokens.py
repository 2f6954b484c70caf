"""Whether the two files of a token table, and that of the final norm, are what the manifest lists and agree.

Legend: N rows, K of them kept, and D documents of one part, H hidden.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import Part
from nemo_qwen_hidden.store.fields import Fields, load_json
from nemo_qwen_hidden.store.header import Header, TensorSpec, read_header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.norm_file import EPSILON, WEIGHT
from nemo_qwen_hidden.store.table import (
    COLUMNS,
    FIRST_ROW,
    KEPT,
    KEPT_BYTES,
    lines_name,
    table_name,
)
from nemo_qwen_hidden.store.table import (
    WEIGHT as ROW_WEIGHT,
)
from nemo_qwen_hidden.store.upkeep.checked import BLOCK_BYTES, CheckedFile, digest_problem

_DOCUMENTS_AT_ONCE = 1 << 16
_ROWS_AT_ONCE = 1 << 18
_MOST_LINE_BYTES = 1 << 24
_ID_BYTES, _FIRST_ROW_BYTES = 4, 8


class TableCheck:
    """The table of one part of a store, and its file of documents.

    Args:
        number: of the part.
    """

    def __init__(self, manifest: Manifest, number: int) -> None:
        self._part, self._number = manifest.parts[number], number
        self._vocab_size = architecture_of(manifest).get("vocab_size")

    def table_problems(self, file: CheckedFile, *, full: bool) -> Iterator[str]:
        """What is wrong with the table, in words.

        Raises:
            StoreError: the file holds no safetensors, or becomes shorter while it is read.
        """
        if self._part.tokens.file != table_name(self._number):
            yield f"must be named {table_name(self._number)}"
        header = read_header(file.descriptor, file.name)
        wrong = _layout_problem(header, _table_layout(self._part))
        digest = digest_problem(file, self._part.tokens.sha256) if full and wrong is None else None
        if wrong is not None or digest is not None:
            yield wrong or digest or ""
        elif full:
            yield from self._column_problems(file, header)
            yield from self._kept_problems(file, header)
            yield from self._weight_problems(file, header)

    def lines_problems(self, file: CheckedFile, table: CheckedFile | None, *, full: bool) -> Iterator[str]:
        """What is wrong with the lines about documents, in words.

        Args:
            table: the part's table, which has passed ``table_problems``; None where it has not.

        Raises:
            StoreError: a line is not what it should be, or the file becomes shorter while it is read.
        """
        if self._part.lines.file != lines_name(self._number):
            yield f"must be named {lines_name(self._number)}"
        if not full:
            return
        digest = digest_problem(file, self._part.lines.sha256)
        if digest is not None:
            yield digest
        elif table is not None:
            yield from self._document_problems(file, table)

    def _column_problems(self, file: CheckedFile, header: Header) -> Iterator[str]:
        """Documents some at a time, and of each of those their rows some at a time."""
        previous = 0
        for document in range(0, self._part.documents + 1, _DOCUMENTS_AT_ONCE):
            count = min(_DOCUMENTS_AT_ONCE + 1, self._part.documents + 1 - document)
            first_row = _column(file, header, FIRST_ROW, document, count)
            ascends = first_row[0] == previous if document else first_row[0] == 0
            if not ascends or (np.diff(first_row) < 0).any() or first_row[-1] > self._part.rows:
                yield f"{FIRST_ROW} must ascend from 0 to {self._part.rows}"
                return
            for row in range(int(first_row[0]), int(first_row[-1]), _ROWS_AT_ONCE):
                stop = min(row + _ROWS_AT_ONCE, int(first_row[-1]))
                wrong = self._row_problem(file, header, range(row, stop), document, first_row)
                if wrong is not None:
                    yield wrong
                    return
            previous = int(first_row[min(count - 1, _DOCUMENTS_AT_ONCE)])
        if previous != self._part.rows:
            yield f"{FIRST_ROW} must end at {self._part.rows}, but ends at {previous}"

    def _kept_problems(self, file: CheckedFile, header: Header) -> Iterator[str]:
        """Of the rows whose states are stored, some at a time."""
        previous = -1
        for start in range(0, self._part.kept or 0, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, self._part.states - start)
            rows = np.append(previous, _column(file, header, KEPT, start, count))
            falls = np.flatnonzero(rows[1:] <= rows[:-1])
            if len(falls):
                place = int(falls[0])
                rule = f"{KEPT} must ascend from 0 to {self._part.rows - 1}"
                yield f"{rule}, but has {rows[place + 1]} at {start + place}, after {rows[place]}"
                return
            previous = int(rows[-1])
        if previous >= self._part.rows:
            yield f"{KEPT} must hold rows below {self._part.rows}, but ends with {previous}"

    def _weight_problems(self, file: CheckedFile, header: Header) -> Iterator[str]:
        """Whether each row's weight in a mean is at least 0; their sums are not checked."""
        for start in range(0, self._part.rows if self._part.weighted else 0, _ROWS_AT_ONCE):
            weight = _column(file, header, ROW_WEIGHT, start, min(_ROWS_AT_ONCE, self._part.rows - start)).view("<f4")
            if not (np.isfinite(weight).all() and (weight >= 0).all()):
                yield f"{ROW_WEIGHT} must be finite and at least 0"
                return

    def _row_problem(
        self, file: CheckedFile, header: Header, rows: range, document: int, first_row: NDArray[np.int64]
    ) -> str | None:
        """Of rows of the documents that ``first_row`` is about, of which the first is number ``document``."""
        token_id, of_row, position = (_column(file, header, name, rows.start, len(rows)) for name in COLUMNS)
        most = self._vocab_size if isinstance(self._vocab_size, int) else 2**31
        if token_id.min() < 0 or token_id.max() >= most:
            return f"token_id must be from 0 to {most - 1}, but is from {token_id.min()} to {token_id.max()}"
        numbers = np.arange(rows.start, rows.stop)
        inside = np.searchsorted(first_row, numbers, side="right") - 1
        for name, found, expected in (
            ("document", of_row, document + inside),
            ("position", position, numbers - first_row[inside]),
        ):
            if not np.array_equal(found, expected):
                row = int((found != expected).argmax())
                return f"{name} of row {rows[row]} must be {expected[row]}, as {FIRST_ROW} says, but is {found[row]}"
        return None

    def _document_problems(self, file: CheckedFile, table: CheckedFile) -> Iterator[str]:
        header = read_header(table.descriptor, table.name)
        tokens = _Tokens(table, header, self._part)
        data, fingerprint, windowed = self._part.data, hashlib.sha256(), 0
        most = data.get("max_tokens")
        with os.fdopen(os.dup(file.descriptor), "rb") as lines:
            lines.seek(0)
            for document in range(self._part.documents):
                count = tokens.lengths(document)
                fields = _line(lines.readline(_MOST_LINE_BYTES), f"{file.name}: line {document + 1}")
                name, rows, given = fields.text("id"), fields.integer("rows"), fields.text("sha256")
                fields.text("source")
                if rows != count:
                    yield f"line {document + 1} must say of {count} rows, as {FIRST_ROW} does, but says of {rows}"
                    return
                encoded = name.encode(errors="surrogatepass")
                fingerprint.update(len(encoded).to_bytes(8, "little") + encoded + count.to_bytes(8, "little"))
                if tokens.sha256(count, fingerprint) != given:
                    yield f"line {document + 1} must have the sha256 of its document's tokens"
                    return
                windowed += isinstance(most, int) and count > most
            if lines.read(1):
                yield f"must hold {self._part.documents} lines, one a document"
                return
        yield from _data_problems(data, fingerprint.hexdigest(), windowed)


def norm_problems(file: CheckedFile, manifest: Manifest, *, full: bool) -> Iterator[str]:
    """What is wrong with the file of the final norm's weight, in words.

    Raises:
        StoreError: the file holds no safetensors, or becomes shorter while it is read.
    """
    assert manifest.final_norm is not None, "called where there is one"
    header = read_header(file.descriptor, file.name)
    wrong = _layout_problem(header, {WEIGHT: TensorSpec(dtype="F32", shape=(manifest.hidden_size,))})
    if wrong is not None:
        yield wrong
        return
    known = architecture_of(manifest).get("norm_epsilon")
    epsilon = _number(header.metadata.get(EPSILON, ""))
    if not 0 <= epsilon < 1 or (isinstance(known, float) and epsilon != known):
        wanted = "a number from 0 to 1" if known is None else f"{known}, the model's"
        yield f"{EPSILON} must be {wanted}, but is {header.metadata.get(EPSILON)!r}"
    if full:
        yield from filter(None, [digest_problem(file, manifest.final_norm.sha256)])
        weight_H = file.at(header.offsets[WEIGHT], 4 * manifest.hidden_size).view("<f4")
        if not np.isfinite(weight_H).all():
            yield f"{WEIGHT} must be finite"


def architecture_of(manifest: Manifest) -> Mapping[str, Any]:
    """What the manifest says of the model's sizes, empty where it says nothing."""
    known = manifest.model.get("architecture")
    return known if isinstance(known, dict) else {}


class _Tokens:
    """The token ids of one document after the other."""

    def __init__(self, table: CheckedFile, header: Header, part: Part) -> None:
        self._table, self._header, self._part = table, header, part
        self._place = header.offsets[COLUMNS[0]]
        self._lengths: list[int] = []

    def lengths(self, document: int) -> int:
        """Of the next ``document``."""
        inside = document % _DOCUMENTS_AT_ONCE
        if inside == 0:
            count = min(_DOCUMENTS_AT_ONCE, self._part.documents - document) + 1
            self._lengths = np.diff(_column(self._table, self._header, FIRST_ROW, document, count)).tolist()
        return self._lengths[inside]

    def sha256(self, count: int, also: "hashlib._Hash") -> str:
        """Of the next ``count`` token ids, which ``also`` gets too."""
        digest, left = hashlib.sha256(), count * _ID_BYTES
        while left:
            block = self._table.at(self._place, min(left, BLOCK_BYTES))
            digest.update(block.data)
            also.update(block.data)
            self._place, left = self._place + len(block), left - len(block)
        return digest.hexdigest()


def _data_problems(data: Mapping[str, Any], fingerprint: str, windowed: int) -> Iterator[str]:
    """What the manifest says of the data, where it says so."""
    found = {"sha256": fingerprint, "documents_cut_into_windows": windowed}
    for name, value in found.items():
        if name == "documents_cut_into_windows" and "max_tokens" not in data:
            continue
        if name in data and data[name] != value:
            yield f"data.{name} must be {value}, as its documents say, but is {data[name]!r} in the manifest"


def _table_layout(part: Part) -> dict[str, TensorSpec]:
    layout = {FIRST_ROW: TensorSpec(dtype="I64", shape=(part.documents + 1,))}
    if part.kept is not None:
        layout[KEPT] = TensorSpec(dtype="I64", shape=(part.kept,))
    if part.weighted:
        layout[ROW_WEIGHT] = TensorSpec(dtype="F32", shape=(part.rows,))
    return layout | {name: TensorSpec(dtype="I32", shape=(part.rows,)) for name in COLUMNS}


def _layout_problem(header: Header, expected: Mapping[str, TensorSpec]) -> str | None:
    if list(header.tensors.items()) == list(expected.items()):
        return None
    wanted, found = (
        ", ".join(f"{name} {spec.dtype} {list(spec.shape)}" for name, spec in layout.items())
        for layout in (expected, header.tensors)
    )
    return f"must hold {wanted}, as the manifest says, but holds {found}"


def _column(file: CheckedFile, header: Header, name: str, start: int, count: int) -> NDArray[Any]:
    size = {FIRST_ROW: _FIRST_ROW_BYTES, KEPT: KEPT_BYTES}.get(name, _ID_BYTES)
    return file.at(header.offsets[name] + start * size, count * size).view(f"<i{size}")


def _line(text: bytes, name: str) -> Fields:
    if not text.endswith(b"\n"):
        raise StoreError(name, f"must be a whole line of at most {_MOST_LINE_BYTES} bytes", len(text))
    return Fields(load_json(text, name), file=name)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
