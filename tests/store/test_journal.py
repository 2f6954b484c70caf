"""A line is believed whole or not at all, whatever a crash has made of its file."""

import json
import os
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.entries import ShardEntry
from nemo_qwen_hidden.store.statistics import ShardStatistics, StoredError
from nemo_qwen_hidden.store.write import journal
from nemo_qwen_hidden.store.write.journal import JournalWriter, Record
from tests.store.helpers import FINAL, POINT, POINTS

STATISTICS = ShardStatistics(rows=5, nan=0, inf=0, max_abs=1.5, max_abs_row=2, min_norm=0.1, max_norm=3.7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    return tmp_path


def entry(number: int, error: StoredError | None = None) -> ShardEntry:
    name = f"{POINT}/{number:06d}.safetensors"
    sizes = {"first_row": 5 * number, "rows": 5, "bytes": 999, "sha256": "ab" * 32}
    return ShardEntry(file=name, **sizes, statistics=STATISTICS, error=error)


def error(rows: int, units: int = 7, most: float = 0.25) -> StoredError:
    return StoredError(rows=rows, units=units, max=most)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "journal").glob("*.jsonl"))


def test_what_was_said_is_read(folder: Path) -> None:
    with closing(JournalWriter(folder, 0)) as zero, closing(JournalWriter(folder, 1)) as one:
        zero.rows({POINT: [(0, 3), (8, 2)], FINAL: [(0, 3), (8, 2)]}, {(POINT, 0): error(3), (POINT, 1): error(2)})
        one.rows({POINT: [(3, 2)]}, {(POINT, 0): error(2, 2**60, 0.5)})
        one.sealed({(POINT, 4): entry(4, error(5))})
        assert len(files(folder)) == 2  # readable while it is written
        found = journal.read(folder)
    assert found == Record(
        rows={POINT: RowSet([(0, 5), (8, 2)]), FINAL: RowSet([(0, 3), (8, 2)])},
        errors={(POINT, 0): error(5, 2**60 + 7, 0.5), (POINT, 1): error(2)},
        sealed={(POINT, 4): entry(4, error(5))},
    )


def test_nothing_was_said(folder: Path) -> None:
    assert journal.read(folder) == Record()
    with closing(JournalWriter(folder, 3)) as out:
        out.rows({}, {})
    assert journal.read(folder) == Record()


def test_rows_that_two_files_claim_are_known(folder: Path) -> None:
    for rank in range(2):
        with closing(JournalWriter(folder, rank)) as out:
            out.rows({POINT: [(rank, 2)], FINAL: [(2 * rank, 2)]}, {})
    assert journal.read(folder).twice == {POINT}


def test_every_line_is_durable_before_the_call_returns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    pwrite, fsync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *arguments: done.append("write") or pwrite(*arguments))
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("sync") or fsync(descriptor))
    with closing(JournalWriter(folder, 0)) as out:
        assert done == ["sync"]  # the file's name
        out.rows({POINT: [(0, 1)]}, {})
        out.sealed({(POINT, 1): entry(1)})
    assert done == ["sync", "write", "sync", "write", "sync"]


SAID = [[(0, 2)], [(5, 1), (9, 4)], [(20, 1)], [(22, 300)]]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_what_a_crash_cut_or_flipped_is_never_believed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The lines before the spoilt byte are; nothing is invented."""
    folder = tmp_path_factory.mktemp("j")
    (folder / "journal").mkdir()
    lines: list[int] = [0]
    with closing(JournalWriter(folder, 0)) as out:
        for ranges in SAID:
            out.rows({POINT: ranges}, {(POINT, 0): error(1)})
            lines.append(files(folder)[0].stat().st_size)
    text = bytearray(files(folder)[0].read_bytes())
    at = data.draw(st.integers(0, len(text) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "scribble", "zeros"]))
    before = bytes(text)
    if kind == "cut":
        del text[at:]
    elif kind == "flip":
        text[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        length = data.draw(st.integers(1, len(text) - at))
        text[at : at + length] = bytes(length) if kind == "zeros" else data.draw(st.binary(min_size=length))[:length]
    files(folder)[0].write_bytes(text)
    same = next((index for index, (one, other) in enumerate(zip(text, before, strict=False)) if one != other), None)
    spoilt = len(text) if same is None else same
    whole = sum(end <= spoilt for end in lines[1:])
    # a changed line end may leave the text before it whole, never the line; upper case in a checksum is no checksum
    expected = RowSet(pair for ranges in SAID[:whole] for pair in ranges)
    found = journal.read(folder)
    assert found.rows.get(POINT, RowSet()) == expected
    assert found.errors.get((POINT, 0), error(0, 0, 0.0)).rows == whole


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"rows": [{"hook_points": ["embed"], "ranges": [[0]]}]}, "ranges"),
        ({"rows": [{"hook_points": [7], "ranges": []}]}, "hook_points"),
        ({"sealed": {"hook_point": "embed", "shard": 0}}, "file"),
        ({"errors": [{"hook_point": "embed"}]}, "shard"),
    ],
)
def test_a_whole_line_that_makes_no_sense_is_not_passed_over(folder: Path, line: dict[str, Any], said: str) -> None:
    """A crash does not make one; taking it for the end would forget work in silence."""
    text = json.dumps(line).encode()
    path = folder / "journal/0-ab.jsonl"
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))
    with pytest.raises(StoreError, match=said) as caught:
        journal.read(folder)
    assert str(path) in str(caught.value)


def test_a_journal_that_was_replaced_says_the_same(folder: Path) -> None:
    with closing(JournalWriter(folder, 0)) as zero, closing(JournalWriter(folder, 1)) as one:
        zero.rows({POINT: [(0, 3)], FINAL: [(0, 3)]}, {(POINT, 0): error(3)})
        one.rows({POINT: [(7, 1)]}, {(POINT, 1): error(1)})
        one.sealed({(FINAL, 4): entry(4)})
    before = journal.read(folder)
    journal.replace(folder, before)
    assert len(files(folder)) == 1 and journal.read(folder) == before


@pytest.mark.parametrize("steps", range(4))
def test_a_crash_while_the_journal_is_replaced_says_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Files that were replaced count no more, though some are still there; twice in a row."""
    for rank in range(3):
        with closing(JournalWriter(folder, rank)) as out:
            out.rows({POINT: [(3 * rank, 2)]}, {(POINT, 0): error(2)})
    before, unlink, calls = journal.read(folder), Path.unlink, 0

    def crash(path: Path, missing_ok: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls > steps:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    for _ in range(2):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", crash)
            try:
                journal.replace(folder, before)
            except KeyboardInterrupt:
                assert steps < 3
        assert journal.read(folder) == before and not journal.read(folder).twice
    journal.replace(folder, before)
    assert len(files(folder)) == 1 and journal.read(folder) == before


def test_names_of_others_are_left_alone(folder: Path) -> None:
    for name in ("job.lock", "0-ab.jsonl.tmp", "x.jsonl"):
        (folder / "journal" / name).write_text("not a line")
    journal.replace(folder, journal.read(folder))
    assert {path.name for path in (folder / "journal").iterdir()} >= {"job.lock", "0-ab.jsonl.tmp", "x.jsonl"}


def test_a_journal_is_not_read_through_a_link(folder: Path) -> None:
    (folder / "elsewhere").write_text("")
    (folder / "journal/0-ab.jsonl").symlink_to(folder / "elsewhere")
    with pytest.raises(StoreError, match="reached through no symbolic link"):
        journal.read(folder)


def test_what_concerns_some_shards_can_be_forgotten() -> None:
    everything = Record(
        rows={POINT: RowSet([(0, 15)]), FINAL: RowSet([(0, 15)])},
        errors={(POINT, 1): error(5), (POINT, 2): error(5)},
        sealed={(POINT, 0): entry(0), (FINAL, 1): entry(1)},
    )
    left = everything.without({(POINT, 1): range(5, 10), (FINAL, 1): range(5, 10)})
    assert left == Record(
        rows={POINT: RowSet([(0, 5), (10, 5)]), FINAL: RowSet([(0, 5), (10, 5)])},
        errors={(POINT, 2): error(5)},
        sealed={(POINT, 0): entry(0)},
    )


def test_hook_points_of_the_same_rows_share_a_line(folder: Path) -> None:
    """Else a store of every layer would have as many journals as layers."""
    with closing(JournalWriter(folder, 0)) as out:
        out.rows({point: [(0, 1000), (2000, 5)] for point in POINTS}, {})
    assert files(folder)[0].read_bytes().count(b"1000") == 1
    assert journal.read(folder).rows == dict.fromkeys(POINTS, RowSet([(0, 1000), (2000, 5)]))
