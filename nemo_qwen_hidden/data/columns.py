"""Parquet files and folders saved by ``datasets``: records in columns, a few hundred in memory at a time."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.files import SourceFile
from nemo_qwen_hidden.data.record import TOKEN_IDS, Fields, to_document

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_RECORDS = 256
_PAGE_BUFFER_BYTES = 1 << 20


def read_parquet(file: SourceFile, fields: Fields) -> Iterator[Document]:
    """The documents of one Parquet file, in order.

    Raises:
        DataError: not a Parquet file, no column of text or token ids, a column of the wrong type, or a bad record.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Columns page by page; by default, a whole row group is read ahead, and that may be the whole file.
        with pq.ParquetFile(
            file.path, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as parquet:
            columns = _chosen(parquet.schema_arrow, file, fields)
            batches = parquet.iter_batches(batch_size=BATCH_RECORDS, columns=columns)
            yield from _documents(batches, file, fields)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise file.error(f"must be a whole Parquet file ('{file.path}': {_one_line(error)})") from error


def read_saved(file: SourceFile, fields: Fields) -> Iterator[Document]:
    """The documents of a ``Dataset`` saved with ``save_to_disk``, in order; its files are mapped, not read whole.

    Raises:
        DataError: as for Parquet.
    """
    import datasets
    import pyarrow as pa

    try:
        saved = datasets.Dataset.load_from_disk(str(file.path), keep_in_memory=False)
    except (ValueError, KeyError, TypeError) as error:
        # Arrow's own, or JSON beside the data that is not JSON or lacks something.
        raise file.error(f"must be a whole saved dataset ('{file.path}': {_one_line(error)})") from error
    try:
        columns = _chosen(saved.data.schema, file, fields)
        tables = saved.with_format("arrow", columns=columns).iter(batch_size=BATCH_RECORDS)
        yield from _documents(tables, file, fields)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise file.error(f"must be a whole saved dataset ('{file.path}': {_one_line(error)})") from error


def _documents(
    batches: "Iterable[pa.RecordBatch] | Iterable[pa.Table]", file: SourceFile, fields: Fields
) -> Iterator[Document]:
    index = 0
    for batch in batches:
        columns = {name: batch.column(name) for name in batch.schema.names}
        for row in range(batch.num_rows):
            place = f"row {index} of '{file.path}'"
            record = {name: column[row].as_py() for name, column in columns.items()}
            yield to_document(record, file=file, index=index, place=place, fields=fields)
            index += 1


def _chosen(schema: "pa.Schema", file: SourceFile, fields: Fields) -> list[str]:
    """The columns to read, checked by type before any row is."""
    held = set(schema.names)
    if not held & set(fields.contents):
        names = ", ".join(f"`{name}`" for name in schema.names) or "no column"
        what = f"'{file.path}' has {names}; `data.text_field` names the text"
        columns = "`, `".join(fields.contents[:-1])
        raise file.error(f"must have a column `{columns}` or `{fields.messages}` ({what})")
    if fields.mask is not None and fields.mask not in held:
        raise file.error(f"must have a column `{fields.mask}`, the mask ('{file.path}' has none)")
    wanted = (*fields.contents, fields.id, *([] if fields.mask is None else [fields.mask]))
    chosen = [name for name in wanted if name in held]
    for name in chosen:
        if schema.names.count(name) > 1:
            raise file.error(f"must have one column of a name ('{file.path}' has several `{name}`)")
        if name == TOKEN_IDS and not _is_integers(schema.field(name).type):
            what = f"'{file.path}' has {schema.field(name).type}"
            raise file.error(f"must have lists of integers in column `{TOKEN_IDS}` ({what})")
    return chosen


def _is_integers(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    item = kind.value_type if is_list else kind
    # A column that is null throughout, or lists that are all empty, have no type of their own.
    return bool(types.is_null(item) or (is_list and types.is_integer(item)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
