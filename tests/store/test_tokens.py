"""The token table: what goes in comes out, in memory that does not grow, and damage is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.token_writer import TokenTableWriter
from nemo_qwen_hidden.store.tokens import DocumentInfo, TokenTable
from tests.store.helpers import python

DOCUMENTS: tuple[list[int], ...] = ([5, 6, 7], [], [8], [1, 2, 3, 4])


def write(folder: Path, documents: tuple[list[int], ...] = DOCUMENTS) -> TokenTable:
    with TokenTableWriter(folder) as writer:
        for number, ids in enumerate(documents):
            writer.append(document_id=f"id {number}\n", source="é\ud800.txt", token_ids=np.array(ids, np.int32))
    return TokenTable(folder, writer.close())


def test_columns(tmp_path: Path) -> None:
    table = write(tmp_path)
    assert (table.rows, table.documents) == (8, 4)
    assert table.token_id.tolist() == [5, 6, 7, 8, 1, 2, 3, 4]
    assert table.document.tolist() == [0, 0, 0, 2, 3, 3, 3, 3]
    assert table.position.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert table.document_first_row.tolist() == [0, 3, 3, 4, 8]
    assert [array.dtype for array in (table.token_id, table.document, table.position)] == [np.int32] * 3
    assert table.document_first_row.dtype == np.int64
    assert not table.token_id.flags.writeable


def test_documents(tmp_path: Path) -> None:
    table = write(tmp_path)
    assert [table.document_rows(i) for i in range(4)] == [range(0, 3), range(3, 3), range(3, 4), range(4, 8)]
    assert table.first_row(3) == 4
    assert table.lengths(0, 4).tolist() == [3, 0, 1, 4]
    assert table.lengths(2, 100).tolist() == [1, 4]
    assert table.document_info(3) == DocumentInfo(id="id 3\n", source="é\ud800.txt", rows=4)
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match=f"document {wrong} is not one of 4"):
            table.document_info(wrong)


def test_files_are_for_other_tools_too(tmp_path: Path) -> None:
    table = write(tmp_path)
    arrays = load_file(tmp_path / "tokens/000000.safetensors")
    assert set(arrays) == {"token_id", "document", "position", "document_first_row"}
    assert all(np.array_equal(arrays[name], getattr(table, name)) for name in arrays)
    lines = (tmp_path / "tokens/000000.documents.jsonl").read_text().splitlines()
    assert [json.loads(line)["rows"] for line in lines] == [3, 0, 1, 4]


def test_part_says_what_was_written(tmp_path: Path) -> None:
    with TokenTableWriter(tmp_path) as writer:
        writer.append(document_id="a", source="b", token_ids=np.array([1, 2], np.int32))
        part = writer.close()
    assert part is writer.close()
    assert (part.rows, part.documents, part.first_row, part.first_document) == (2, 1, 0, 0)
    assert part.bytes == sum(path.stat().st_size for path in (tmp_path / "tokens").iterdir())
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [
        "000000.documents.jsonl",
        "000000.safetensors",
    ]


def test_an_empty_table(tmp_path: Path) -> None:
    table = write(tmp_path, ())
    assert (table.rows, table.documents, table.document_first_row.tolist()) == (0, 0, [0])


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=6))
@settings(max_examples=30, deadline=None)
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    table = write(tmp_path_factory.mktemp("t"), tuple(documents))
    assert table.token_id.tolist() == [token for document in documents for token in document]
    for number, ids in enumerate(documents):
        rows = table.document_rows(number)
        assert table.token_id[rows.start : rows.stop].tolist() == ids
        assert table.document_info(number).rows == len(ids)


def test_line_ends_are_found_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_qwen_hidden.store.tokens._SCAN_BYTES", 7)
    table = write(tmp_path)
    assert [table.document_info(i).id for i in range(4)] == [f"id {i}\n" for i in range(4)]


def test_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), TokenTableWriter(tmp_path) as writer:
        writer.append(document_id="a", source="b", token_ids=np.array([1], np.int32))
        raise RuntimeError("boom")
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("ids", [np.array([1, 2]), np.array([[1]], np.int32), np.array([1.0])])
def test_token_ids_are_one_dimensional_int32(tmp_path: Path, ids: NDArray[Any]) -> None:
    with TokenTableWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"token_ids must be int32 \[tokens\]"):
        writer.append(document_id="a", source="b", token_ids=ids)


def test_too_many_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_qwen_hidden.store.token_writer._MOST_DOCUMENTS", 1)
    with pytest.raises(StoreError, match="must hold at most 1 documents"):
        write(tmp_path)


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.token_writer import TokenTableWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
writer = TokenTableWriter(Path(sys.argv[1]))
try:
    for _ in range(int(sys.argv[2])):
        writer.append(document_id="a", source="b", token_ids=np.zeros(100_000, np.int32))
    writer.close()
except StoreError as error:
    print(error)
    try:
        writer.close()
    except ValueError as closed:
        print(closed)
"""


@pytest.mark.parametrize("documents", [20, 5])  # while it grows; only when it is put together
def test_a_full_disk_leaves_nothing(tmp_path: Path, documents: int) -> None:
    said = python(FULL_DISK, tmp_path, documents)
    assert said[0].startswith("`store.path` must have room for the store (File too large")
    assert "closed file" in said[1]
    assert list((tmp_path / "tokens").iterdir()) == []


def test_memory_stays_flat(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from nemo_qwen_hidden.store.token_writer import TokenTableWriter
ids = np.zeros(1000, np.int32)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with TokenTableWriter(Path(sys.argv[1])) as writer:
    for number in range(6000):
        if number == 600:
            before = peak()
        writer.append(document_id="a", source="b", token_ids=ids)
print(peak() - before)
"""
    grown_kb = int(python(code, tmp_path)[0])
    assert grown_kb < 8000  # 72 MB went to disk


def damage(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def test_damage_is_named(tmp_path: Path) -> None:
    part = None
    with TokenTableWriter(tmp_path) as writer:
        writer.append(document_id="a", source="b", token_ids=np.array([1, 2], np.int32))
        part = writer.close()
    lines = tmp_path / part.documents_file
    whole = lines.read_bytes()
    for text, message in (
        (whole * 2, "must hold 1 whole lines, one a document"),
        (whole[:-1], "must hold 1 whole lines, one a document"),
        (b"[]\n", "line 1` must hold a JSON object"),
        (b'{"id": 3}\n', "line 1: id` must be a string"),
        (whole.replace(b"2", b"3"), "line 1: rows` must be 2, as tokens/000000.safetensors says, but is 3"),
    ):
        lines.write_bytes(text)
        with pytest.raises(StoreError) as caught:
            TokenTable(tmp_path, part).document_info(0)
        assert message in str(caught.value) and str(lines) in str(caught.value)
    table = tmp_path / part.file
    good = table.read_bytes()
    damage(table, b"position", b"somewher")
    with pytest.raises(StoreError, match="must hold the columns"):
        TokenTable(tmp_path, part)
    table.write_bytes(good[: -3 * 8 - 8] + b"\x07" + good[-3 * 8 - 7 :])
    with pytest.raises(StoreError, match="document_first_row` must go from 0 to 2"):
        TokenTable(tmp_path, part)
    table.write_bytes(good[:-1])
    with pytest.raises(StoreError, match="bytes long, as its header says"):
        TokenTable(tmp_path, part)
    table.unlink()
    with pytest.raises(StoreError, match=r"must be a regular file, .* but is 'No such file or directory'"):
        TokenTable(tmp_path, part)


def test_another_table_than_the_manifest_lists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a")
    with TokenTableWriter(tmp_path / "b") as writer:
        pass
    with pytest.raises(StoreError, match=r"must hold 0 rows of 0 documents, as the manifest says, but is \(8, 4\)"):
        TokenTable(tmp_path / "a", writer.close())
