"""The token tables: what goes in comes out, in memory that does not grow, and damage is named."""

import hashlib
import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import Part
from nemo_qwen_hidden.store.read.tokens import DocumentInfo, PartTokens, TokenTable
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter
from tests.store.helpers import python

DOCUMENTS: tuple[list[int], ...] = ([5, 6, 7], [], [8], [1, 2, 3, 4])


def write_part(folder: Path, documents: tuple[list[int], ...] = DOCUMENTS, *, part: int = 0, first: int = 0) -> Part:
    with TokenTableWriter(folder, shard_rows=5, part=part) as writer:
        for number, ids in enumerate(documents, first):
            writer.append(document_id=f"id {number}\n", source="é\ud800.txt", token_ids=np.array(ids, np.int32))
    return writer.close()


def write(folder: Path, documents: tuple[list[int], ...] = DOCUMENTS) -> PartTokens:
    return PartTokens(folder, write_part(folder, documents))


def write_parts(folder: Path, parts: tuple[tuple[list[int], ...], ...]) -> TokenTable:
    first_rows = [0, *accumulate(sum(map(len, documents)) for documents in parts)]
    firsts = [0, *accumulate(map(len, parts))]
    written = [
        replace(
            write_part(folder, documents, part=number, first=firsts[number]),
            first_row=first_rows[number],
            first_document=firsts[number],
        )
        for number, documents in enumerate(parts)
    ]
    return TokenTable(folder, written)


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
    assert table.lengths(0, 4).tolist() == [3, 0, 1, 4]
    assert table.lengths(2, 100).tolist() == [1, 4]
    digest = "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72"
    assert table.document_info(3) == DocumentInfo(id="id 3\n", source="é\ud800.txt", rows=4, sha256=digest)
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
    with TokenTableWriter(tmp_path, shard_rows=5) as writer:
        writer.append(document_id="a", source="b", token_ids=np.array([1, 2], np.int32))
        part = writer.close()
    assert part is writer.close()
    assert (part.rows, part.documents, part.first_row, part.first_document, part.shard_rows) == (2, 1, 0, 0, 5)
    for entry in (part.tokens, part.lines):
        data = (tmp_path / entry.file).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
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
    monkeypatch.setattr("nemo_qwen_hidden.store.read.tokens._SCAN_BYTES", 7)
    table = write(tmp_path)
    assert [table.document_info(i).id for i in range(4)] == [f"id {i}\n" for i in range(4)]


def test_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), TokenTableWriter(tmp_path, shard_rows=5) as writer:
        writer.append(document_id="a", source="b", token_ids=np.array([1], np.int32))
        raise RuntimeError("boom")
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("ids", [np.array([1, 2]), np.array([[1]], np.int32), np.array([1.0])])
def test_token_ids_are_one_dimensional_int32(tmp_path: Path, ids: NDArray[Any]) -> None:
    with (
        TokenTableWriter(tmp_path, shard_rows=5) as writer,
        pytest.raises(ValueError, match=r"token_ids must be int32 \[tokens\]"),
    ):
        writer.append(document_id="a", source="b", token_ids=ids)


def test_too_many_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_qwen_hidden.store.write.token_writer._MOST_DOCUMENTS", 1)
    with pytest.raises(StoreError, match="must hold at most 1 documents"):
        write(tmp_path)


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
writer = TokenTableWriter(Path(sys.argv[1]), shard_rows=5)
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
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter
ids = np.zeros(1000, np.int32)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with TokenTableWriter(Path(sys.argv[1]), shard_rows=5) as writer:
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
    with TokenTableWriter(tmp_path, shard_rows=5) as writer:
        writer.append(document_id="a", source="b", token_ids=np.array([1, 2], np.int32))
        part = writer.close()
    lines = tmp_path / part.lines.file
    whole = lines.read_bytes()
    for text, message in (
        (whole * 2, "must hold 1 whole lines, one a document"),
        (whole[:-1], "must hold 1 whole lines, one a document"),
        (b"[]\n", "line 1` must hold a JSON object"),
        (b'{"id": 3}\n', "line 1: id` must be a string"),
        (
            whole.replace(b'"rows": 2', b'"rows": 3'),
            "line 1: rows` must be 2, as tokens/000000.safetensors says, but is 3",
        ),
    ):
        lines.write_bytes(text)
        with pytest.raises(StoreError) as caught:
            PartTokens(tmp_path, replace(part, lines=replace(part.lines, bytes=len(text)))).document_info(0)
        assert message in str(caught.value) and str(lines) in str(caught.value)
        if len(text) != len(whole):
            with pytest.raises(StoreError, match=f"must be {len(whole)} bytes long, as the manifest says, but is"):
                PartTokens(tmp_path, part).document_info(0)
    table = tmp_path / part.tokens.file
    good = table.read_bytes()
    damage(table, b"position", b"somewher")
    with pytest.raises(StoreError, match="must hold the columns"):
        PartTokens(tmp_path, part)
    table.write_bytes(good[: -3 * 8 - 8] + b"\x07" + good[-3 * 8 - 7 :])
    with pytest.raises(StoreError, match="document_first_row` must go from 0 to 2"):
        PartTokens(tmp_path, part)
    table.write_bytes(good[:-1])
    with pytest.raises(StoreError, match="bytes long, as its header says"):
        PartTokens(tmp_path, part)
    table.write_bytes(good)
    with pytest.raises(StoreError, match=f"must be 1 bytes long, as the manifest says, but is {len(good)}"):
        PartTokens(tmp_path, replace(part, tokens=replace(part.tokens, bytes=1)))
    table.unlink()
    with pytest.raises(StoreError, match=r"must be a regular file, .* but is 'No such file or directory'"):
        PartTokens(tmp_path, part)


def test_another_table_than_the_manifest_lists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a")
    part = write_part(tmp_path / "b", ())
    with pytest.raises(StoreError, match=r"must hold 0 rows of 0 documents, as the manifest says, but is \(8, 4\)"):
        PartTokens(tmp_path / "a", part)


def test_parts_are_numbered_through(tmp_path: Path) -> None:
    table = write_parts(tmp_path, (DOCUMENTS, (), ([], [9, 8]), ([],), ([3],)))
    assert (table.rows, table.documents) == (11, 8)
    assert np.asarray(table.token_id).tolist() == [5, 6, 7, 8, 1, 2, 3, 4, 9, 8, 3]
    assert table.document[:].tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 5, 5, 7]
    assert table.position[:].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 0]
    assert [table.document_rows(number) for number in (3, 4, 5, 6, 7)] == [
        range(4, 8),
        range(8, 8),
        range(8, 10),
        range(10, 10),
        range(10, 11),
    ]
    assert [table.document_info(number).id for number in range(8)] == [f"id {number}\n" for number in range(8)]
    assert table.part(2).lengths(0, 9).tolist() == [0, 2] and table.part(2).document[:].tolist() == [1, 1]
    assert len(table.token_id) == 11 and isinstance(table.token_id[10], np.int32)
    for wrong in (-1, 8):
        with pytest.raises(IndexError, match=f"document {wrong} is not one of 8"):
            table.document_rows(wrong)
    with pytest.raises(IndexError, match="row 11 is not one of 11"):
        table.token_id[11]


def test_columns_of_one_part_are_memory_maps(tmp_path: Path) -> None:
    table = write_parts(tmp_path, (DOCUMENTS,))
    assert isinstance(table.token_id, np.ndarray) and not table.token_id.flags.writeable
    assert "tokens/000000.safetensors" in Path("/proc/self/maps").read_text()


def test_a_part_is_opened_when_it_is_asked_for(tmp_path: Path) -> None:
    table = write_parts(tmp_path, (DOCUMENTS, ([9, 8],)))
    (tmp_path / "tokens/000001.safetensors").unlink()
    assert table.token_id[:8].tolist() == [5, 6, 7, 8, 1, 2, 3, 4]
    assert table.document_info(3).rows == 4
    with pytest.raises(StoreError, match=r"tokens/000001.safetensors` must be a regular file"):
        table.token_id[8]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_columns_are_indexed_as_numpy_does(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lengths = st.lists(st.lists(st.just(0), max_size=3), max_size=3)
    drawn = data.draw(st.lists(lengths, max_size=4))
    table = write_parts(tmp_path_factory.mktemp("t"), tuple(tuple(documents) for documents in drawn))
    documents = [document for part in drawn for document in part]
    expected = np.repeat(np.arange(len(documents), dtype=np.int32), [len(document) for document in documents])
    rows = slice(*data.draw(st.tuples(*[st.none() | st.integers(-9, 9)] * 2, st.sampled_from([None, 1, 2, -1]))))
    assert table.document[rows].tolist() == expected[rows].tolist()
    if len(expected):
        many = np.array(data.draw(st.lists(st.integers(-len(expected), len(expected) - 1), max_size=9)), np.int64)
        assert table.document[many].tolist() == expected[many].tolist()
        assert table.document[int(many[0]) if len(many) else 0] == expected[many[0] if len(many) else 0]
