"""Files of every kind as documents."""

import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.sources import check_path, read_documents, read_fields
from nemo_qwen_hidden.errors import DataError

RECORDS: list[dict[str, Any]] = [
    {"id": "a", "text": "one\u2028line, \x85 and\ntwo"},
    {"id": 7, "text": ""},
    {"text": "héllo 👩‍👩‍👧 \u0000 e\u0301"},
    {"id": None, "text": None, "token_ids": [1, 2, 3], "more": {"x": 1}},
    {"id": "z", "token_ids": []},
]


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(record, ensure_ascii=index % 2 == 0) + "\n" for index, record in enumerate(records))
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def columns() -> dict[str, pa.Array]:
    return {
        "id": pa.array([str(record["id"]) if record.get("id") is not None else None for record in RECORDS]),
        "text": pa.array([record.get("text") for record in RECORDS]),
        "score": pa.array([0.5] * len(RECORDS)),
        "token_ids": pa.array([record.get("token_ids") for record in RECORDS], pa.list_(pa.int32())),
    }


def expected(source: str) -> list[Document]:
    return [
        Document(
            id=f"{source}#{index}" if record.get("id") is None else str(record["id"]),
            source=source,
            text=record.get("text"),
            token_ids=record.get("token_ids"),
        )
        for index, record in enumerate(RECORDS)
    ]


def rejection(path: Path, **names: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(str(path), **names))
    assert caught.value.setting == "data.path"
    assert "\n" not in str(caught.value)
    return caught.value.rule


def test_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    text = "one\r\ntwo\rthree\n\u2028\x85\x00 e\u0301 👋\n"
    for name in ("a.txt", "noextension", "b.py", "c.json"):
        (tmp_path / name).write_bytes(text.encode())
        assert list(read_documents(str(tmp_path / name))) == [Document(id=name, source=name, text=text)]


def test_empty_text_file_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    check_path(str(tmp_path))
    assert [document.text for document in read_documents(str(tmp_path))] == [""]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhi \xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}\n')
    assert [document.text for document in read_documents(str(tmp_path))] == ["hi \ufeff", "hi"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.jsonl.gz", "r.ndjson.gz", "R.JSONL"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    path = jsonl(tmp_path / name, RECORDS)
    check_path(str(path))
    assert list(read_documents(str(path))) == expected(name)


def test_jsonl_white_space_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\n  \r\n{"text": "a"}\r\n\n {"text": "b"} ')
    assert [(document.id, document.text) for document in read_documents(str(path))] == [
        ("r.jsonl#0", "a"),
        ("r.jsonl#1", "b"),
    ]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table(columns()), tmp_path / "r.parquet", row_group_size=2)
    check_path(str(tmp_path / "r.parquet"))
    assert list(read_documents(str(tmp_path / "r.parquet"))) == expected("r.parquet")


@pytest.mark.parametrize("kind", [pa.list_(pa.uint16()), pa.large_list(pa.int64()), pa.list_(pa.int32(), 2)])
def test_parquet_column_types(tmp_path: Path, kind: pa.DataType) -> None:
    table = {"token_ids": pa.array([[1, 2], [3, 4]], kind), "id": pa.array([10, 11])}
    pq.write_table(pa.table(table), tmp_path / "r.parquet")
    documents = list(read_documents(str(tmp_path / "r.parquet")))
    assert [(document.id, document.token_ids) for document in documents] == [("10", [1, 2]), ("11", [3, 4])]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_parquet_string_types(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), tmp_path / "r.parquet")
    assert [document.text for document in read_documents(str(tmp_path / "r.parquet"))] == ["a", "b", "a"]


def test_saved_dataset(tmp_path: Path) -> None:
    saved = datasets.Dataset(pa.table(columns())).with_format("numpy", columns=["score"])
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    check_path(str(tmp_path / "saved"))
    assert list(read_documents(str(tmp_path / "saved"))) == expected("saved")


def test_dataset_that_was_shuffled_before_it_was_saved(tmp_path: Path) -> None:
    shuffled = datasets.Dataset.from_dict({"text": [str(number) for number in range(600)]}).shuffle(seed=1)
    shuffled.save_to_disk(str(tmp_path / "saved"))
    assert [document.text for document in read_documents(str(tmp_path / "saved"))] == list(shuffled["text"])


def test_dataset_dict_is_refused_by_its_splits(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    what = f"(the DatasetDict in '{tmp_path / 'both'}' holds test, train)"
    assert rejection(tmp_path / "both") == f"must name the sub-folder of one split {what}"
    assert rejection(tmp_path) == f"must name the sub-folder of one split {what}"
    with pytest.raises(DataError, match="test, train"):
        check_path(str(tmp_path / "both"))
    assert [document.id for document in read_documents(str(tmp_path / "both/train"))] == ["train#0"]


def test_folder_of_mixed_kinds(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(str(tmp_path / "c/saved"))
    pq.write_table(pa.table({"text": ["parquet"]}), tmp_path / "b.parquet")
    jsonl(tmp_path / "a.jsonl.gz", [{"text": "json"}])
    (tmp_path / "d.txt").write_text("plain")
    found = [(document.id, document.source, document.text) for document in read_documents(str(tmp_path))]
    assert found == [
        ("a.jsonl.gz#0", "a.jsonl.gz", "json"),
        ("b.parquet#0", "b.parquet", "parquet"),
        ("c/saved#0", "c/saved", "saved"),
        ("d.txt", "d.txt", "plain"),
    ]


def test_fields_of_other_names(tmp_path: Path) -> None:
    record = {"body": "hi", "key": "k", "text": 1, "id": 2.5}
    jsonl(tmp_path / "r.jsonl", [record])
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "s.parquet")
    found = list(read_documents(str(tmp_path), text_field="body", id_field="key"))
    assert [(document.id, document.text) for document in found] == [("k", "hi"), ("k", "hi")]


@pytest.mark.parametrize(
    ("names", "setting"),
    [
        ({"text_field": "token_ids"}, "data.text_field"),
        ({"id_field": "token_ids"}, "data.id_field"),
        ({"id_field": "text"}, "data.id_field"),
    ],
)
def test_fields_of_one_name_are_refused(tmp_path: Path, names: dict[str, str], setting: str) -> None:
    for read in (read_documents, check_path):
        with pytest.raises(DataError) as caught:
            read(str(tmp_path), **names)
        assert caught.value.setting == setting


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"\xef\xbb\xbf0123456789abcd\xff")
    hint = "a glob such as 'dir/**/*.txt' chooses files"
    assert rejection(path) == f"must be UTF-8 text (byte 17 of '{path}' is not; {hint})"
    with pytest.raises(DataError, match="byte 17"):
        check_path(str(tmp_path))


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "\xff"}', "must be UTF-8 text (byte 10 of line 3 of PATH is not)"),
        (b'{"text": "a"', "each line (line 3 of PATH is not JSON: Expecting ',' delimiter at column 13)"),
        (b"plain text", "each line (line 3 of PATH is not JSON: Expecting value at column 1)"),
        (b'["text"]', "must hold one JSON object in each line (line 3 of PATH is list)"),
        (b'"text"', "(line 3 of PATH is str)"),
        (b"[" * 100_000, "(line 3 of PATH cannot be read: "),
        (b'{"token_ids": [' + b"9" * 5000 + b"]}", "(line 3 of PATH cannot be read: "),
        (b'{"body": "a", "id": 1}', "(line 3 of PATH has `body`, `id`; `data.text_field` names the text)"),
        (b"{}", "must hold one of `text`, `token_ids` and `messages` in each record (line 3 of PATH has nothing; "),
        (b'{"text": null}', "(line 3 of PATH has `text`; "),
        (b'{"text": "a", "token_ids": []}', "(line 3 of PATH has `text` and `token_ids`; `data.text_field` and "),
        (b'{"text": 5}', "must hold a string in `text` (line 3 of PATH has int)"),
        (b'{"text": ["a"]}', "(line 3 of PATH has list)"),
        (b'{"text": "a", "id": 1.5}', "must hold a string or an integer in `id` (line 3 of PATH has float)"),
        (b'{"text": "a", "id": true}', "(line 3 of PATH has bool)"),
        (b'{"token_ids": "1 2"}', "must hold a list of integers in `token_ids` (line 3 of PATH has str)"),
        (b'{"token_ids": [1, 2.0]}', "(line 3 of PATH has 2.0 at position 1)"),
        (b'{"token_ids": [true]}', "(line 3 of PATH has True at position 0)"),
        (b'{"token_ids": [1, null]}', "(line 3 of PATH has None at position 1)"),
        (b'{"token_ids": [[1]]}', "(line 3 of PATH has [1] at position 0)"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_jsonl_lines(tmp_path: Path, line: bytes, what: str, suffix: str) -> None:
    path = tmp_path / f"r{suffix}"
    content = GOOD + b"\n" + line + b"\n" + GOOD
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    check_path(str(path))
    assert what.replace("PATH", f"'{path}'") in rejection(path)


@pytest.mark.parametrize("damage", ["cut", "altered", "not gzip"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(1000)))
    damaged = {"cut": whole[:-20], "altered": whole[:100] + b"\0" * 8 + whole[108:], "not gzip": GOOD}[damage]
    path = tmp_path / "r.jsonl.gz"
    path.write_bytes(damaged)
    assert f"'{path}'" in rejection(path)


@pytest.mark.parametrize("escaped", ['{"text": "ab\\ud800"}', '{"text": "a", "id": "x\\udfff"}'])
def test_lone_surrogates(tmp_path: Path, escaped: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(escaped)
    rule = rejection(path)
    assert "must hold Unicode text without lone surrogates (character " in rule
    assert "'r.jsonl'" in rule
    path.write_text('{"text": "\\ud83d\\ude00"}')
    assert [document.text for document in read_documents(str(path))] == ["😀"]


def test_parquet_without_columns(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"body": ["a"], "label": [1]}), path)
    what = f"('{path}' has `body`, `label`; `data.text_field` names the text)"
    assert rejection(path) == f"must have a column `text`, `token_ids` or `messages` {what}"
    assert "must have a column `content`, `token_ids` or `messages`" in rejection(path, text_field="content")
    with pytest.raises(DataError, match="`body`, `label`"):
        check_path(str(path))


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ({"text": ["a", None]}, "(row 1 of 'PATH' has `text`; "),
        ({"text": ["a", "b"], "token_ids": [None, [1]]}, "(row 1 of 'PATH' has `text` and `token_ids`; "),
        ({"text": [1, 2]}, "must hold a string in `text` (row 0 of 'PATH' has int)"),
        ({"text": [b"a"]}, "(row 0 of 'PATH' has bytes)"),
        ({"token_ids": [[1.5]]}, "must have lists of integers in column `token_ids` ('PATH' has list<"),
        ({"token_ids": [1]}, "('PATH' has int64)"),
        ({"token_ids": [[1], [2, None]]}, "(row 1 of 'PATH' has None at position 1)"),
        ({"text": ["a"], "id": [0.5]}, "must hold a string or an integer in `id` (row 0 of 'PATH' has float)"),
    ],
)
def test_bad_columns(tmp_path: Path, table: dict[str, list[Any]], what: str) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(table), path)
    assert what.replace("PATH", str(path)) in rejection(path)
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "saved"))
    if "list<" not in what:
        assert what.replace("PATH", str(tmp_path / "saved")) in rejection(tmp_path / "saved")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), tmp_path / "r.parquet")
    assert "has several `text`" in rejection(tmp_path / "r.parquet")


def test_empty_and_damaged_tables(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    check_path(str(path))
    assert list(read_documents(str(path))) == []
    pq.write_table(pa.table({"text": [str(number) * 9 for number in range(5000)]}), path, write_page_checksum=True)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[:-9], whole[:2000] + b"\xff" * 64 + whole[2064:]):
        path.write_bytes(damaged)
        assert f"'{path}'" in rejection(path)


def test_invalid_utf8_in_a_string_column(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, *raw.buffers()[1:])}), tmp_path / "r.parquet")
    assert f"'{tmp_path / 'r.parquet'}'" in rejection(tmp_path / "r.parquet")


def test_damaged_saved_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(folder))
    arrow = folder / "data-00000-of-00001.arrow"
    content = arrow.read_bytes()
    arrow.write_bytes(content[:100])
    assert f"'{folder}'" in rejection(folder)
    arrow.unlink()
    assert str(folder) in rejection(folder)
    arrow.write_bytes(content)
    for state in ("{", "{}"):
        (folder / "state.json").write_text(state)
        assert f"'{folder}'" in rejection(folder)


def test_documents_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"bad\n")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    documents = read_documents(str(tmp_path))
    assert next(documents).text == "fine"
    with pytest.raises(DataError, match="line 2"):
        next(documents)
    check_path(str(tmp_path))


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_memory_does_not_grow_with_a_jsonl_file(tmp_path: Path, name: str) -> None:
    def peak_bytes(records: int) -> int:
        path = jsonl(tmp_path / name, [{"text": "x" * 2000}] * records)
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_documents(str(path))) == records
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(10)
    assert peak_bytes(2000) < peak_bytes(200) + 20_000 < 500_000


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    def peak_bytes(rows: int) -> int:
        texts = [f"{number:04}" * 500 for number in range(rows)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "r.parquet", row_group_size=rows, use_dictionary=False)
        del texts
        before, peak = pa.total_allocated_bytes(), 0
        for _ in read_documents(str(tmp_path / "r.parquet")):
            peak = max(peak, pa.total_allocated_bytes() - before)
        return peak

    assert peak_bytes(20_000) < 2 * peak_bytes(2_000) < 12_000_000


def test_import_is_cheap() -> None:
    code = (
        "import sys\n"
        "from nemo_qwen_hidden.data import fingerprint, sources, tokenize, tokenizer\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'datasets', 'pyarrow', 'nemo'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz"])
def test_a_field_of_each_record_stands_beside_the_id_of_its_document(tmp_path: Path, name: str) -> None:
    path = jsonl(tmp_path / name, RECORDS)
    found = list(read_fields(str(path), "more"))
    assert [document for document, _ in found] == [document.id for document in read_documents(str(path))]
    assert [value for _, value in found] == [None, None, None, {"x": 1}, None]


def test_fields_are_read_from_jsonl_alone(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(DataError, match="must be JSONL, for the field `kind`"):
        list(read_fields(str(tmp_path / "text.txt"), "kind"))
