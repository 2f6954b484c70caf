"""A path as a stream of documents."""

import codecs
from collections.abc import Callable, Iterator

from nemo_qwen_hidden.data.columns import read_parquet, read_saved
from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.files import JSONL, PARQUET, SAVED, TEXT, SourceFile, list_files
from nemo_qwen_hidden.data.jsonl import read_jsonl, read_jsonl_field
from nemo_qwen_hidden.data.record import Fields

__all__ = ["Document", "check_path", "read_documents", "read_fields"]


def read_documents(
    path: str,
    *,
    text_field: str = "text",
    id_field: str = "id",
    messages_field: str = "messages",
    mask_field: str | None = None,
) -> Iterator[Document]:
    """The documents that ``path`` stands for, read as they are asked for, in an order fixed by file names.

    Args:
        path: a file, a folder (recursive; hidden files and folders skipped), a glob of files (``**`` allowed), or a
            folder saved by ``datasets``. ``.jsonl`` and ``.ndjson`` (also ``.gz``) and ``.parquet`` hold a record for
            each document; any other file is text, and is one document.
        text_field, messages_field, id_field: where a record has its text, or the messages of a chat, and its id;
            ready-made tokens stand in ``token_ids``.
        mask_field: where each record says what of it is kept; None where none needs to.

    Raises:
        DataError: from the call, what ``list_files`` raises; from the iterator, a file or record that cannot be used.
    """
    fields = Fields(text=text_field, id=id_field, messages=messages_field, mask=mask_field)
    return _stream(list_files(path), fields)


def read_fields(path: str, field: str, *, id_field: str = "id") -> Iterator[tuple[str, object]]:
    """Of each document its id, as ``read_documents`` gives it, and the value of another field of its record, None where
    that is absent. What the document holds is not looked at.

    Raises:
        DataError: what ``list_files`` raises; a file that is not JSONL, or cannot be read.
    """
    fields = Fields(text="text", id=id_field)
    for file in list_files(path):
        if file.kind != JSONL:
            raise file.error(f"must be JSONL, for the field `{field}` of its records ('{file.path}' is not)")
        try:
            yield from read_jsonl_field(file, field, fields)
        except OSError as error:
            raise file.unreadable(error) from error


def check_path(
    path: str,
    *,
    text_field: str = "text",
    id_field: str = "id",
    messages_field: str = "messages",
    mask_field: str | None = None,
) -> None:
    """Checks, before anything heavy is started, that each file opens and that the first document can be read.

    Raises:
        DataError: as ``read_documents``.
    """
    fields = Fields(text=text_field, id=id_field, messages=messages_field, mask=mask_field)
    files = list_files(path)
    for file in files:
        if file.kind != SAVED:
            _check_opens(file)
    next(_stream(files, fields), None)


def _stream(files: list[SourceFile], fields: Fields) -> Iterator[Document]:
    for file in files:
        try:
            yield from _READERS[file.kind](file, fields)
        except OSError as error:
            raise file.unreadable(error) from error


def _check_opens(file: SourceFile) -> None:
    try:
        file.path.open("rb").close()
    except OSError as error:
        raise file.unreadable(error) from error


def _read_text(file: SourceFile, fields: Fields) -> Iterator[Document]:
    """One document, byte for byte: line ends stay as they are, and only a leading byte order mark is left out."""
    if fields.mask is not None:
        raise file.error(f"must be JSONL or Parquet, for the mask in `{fields.mask}` ('{file.path}' is text)")
    content = file.path.read_bytes()
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[start:].decode()
    except UnicodeDecodeError as error:
        hint = "a glob such as 'dir/**/*.txt' chooses files"
        rule = f"must be UTF-8 text (byte {start + error.start} of '{file.path}' is not; {hint})"
        raise file.error(rule) from error
    yield Document(id=file.name, source=file.name, text=text)


_READERS: dict[str, Callable[[SourceFile, Fields], Iterator[Document]]] = {
    TEXT: _read_text,
    JSONL: read_jsonl,
    PARQUET: read_parquet,
    SAVED: read_saved,
}
