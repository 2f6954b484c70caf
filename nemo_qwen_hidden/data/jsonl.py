"""JSON lines, plain or gzipped: one record a line, one line in memory at a time."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO

from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.files import SourceFile
from nemo_qwen_hidden.data.record import Fields, document_id, to_document


def read_jsonl(file: SourceFile, fields: Fields) -> Iterator[Document]:
    """The documents of one file, in order; a line of nothing but white space holds none.

    Raises:
        DataError: a line that is not UTF-8, not JSON or not an object, a bad record, or a damaged gzip file.
    """
    for index, (record, place) in enumerate(_records(file)):
        yield to_document(record, file=file, index=index, place=place, fields=fields)


def read_jsonl_field(file: SourceFile, field: str, fields: Fields) -> Iterator[tuple[str, object]]:
    """The id of each document of one file, and what its record has in ``field``: None where that is absent.

    Raises:
        DataError: as ``read_jsonl``, but for what only contents can be wrong in.
    """
    for index, (record, place) in enumerate(_records(file)):
        yield document_id(record, file, index, place, fields), record.get(field)


def _records(file: SourceFile) -> Iterator[tuple[dict[str, object], str]]:
    """Each record, and where it stands."""
    for number, line in enumerate(_lines(file), start=1):
        place = f"line {number} of '{file.path}'"
        text = _decode(line, file, place).rstrip()
        if text:
            yield _parse(text, file, place), place


def _open(file: SourceFile) -> IO[bytes] | gzip.GzipFile:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file.path, "rb")
    return file.path.open("rb")


def _lines(file: SourceFile) -> Iterator[bytes]:
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream):
                yield line if number else line.removeprefix(codecs.BOM_UTF8)
        except (EOFError, zlib.error) as error:
            raise file.error(f"must be a whole gzip file ('{file.path}': {error})") from error


def _decode(line: bytes, file: SourceFile, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise file.error(f"must be UTF-8 text (byte {error.start} of {place} is not)") from error


def _parse(text: str, file: SourceFile, place: str) -> dict[str, object]:
    rule = "must hold one JSON object in each line"
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise file.error(f"{rule} ({place} is not JSON: {error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or brackets nested as deep.
        raise file.error(f"{rule} ({place} cannot be read: {error})") from error
    if not isinstance(record, dict):
        raise file.error(f"{rule} ({place} is {type(record).__name__})")
    return record
