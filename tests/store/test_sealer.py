"""Shards that one writer fills alone are sealed while others are written, to the same bytes as afterwards."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_qwen_hidden.errors import CoverageError, StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.store.write import journal, place, session
from nemo_qwen_hidden.store.write.writer import ShardWriter
from tests.store.helpers import LENGTHS, POINT, ROWS, Run, draft, finish, make_store, tree, truth, write_tokens

SHARD_ROWS = 5


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Callable[..., tuple[Path, Manifest]]]:
    """Begins the store of ``make_store`` under another name."""

    def begin(**changes: str) -> tuple[Path, Manifest]:
        path = tmp_path / "early"
        with place.locked(path), session.staging(path) as staged:
            part, _ = write_tokens(staged, LENGTHS, shard_rows=SHARD_ROWS)
            target = draft(part, **changes)
            session.start(path, target, {}, staged=staged)
        return path, target

    yield begin
    assert not [thread for thread in threading.enumerate() if thread.name in ("sealer", "store writer")]


def names(path: Path, point: HookPoint = POINT) -> list[str]:
    return sorted(file.name for file in (path / str(point)).iterdir())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("commit_secs", [0.0, 100.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_store_as_when_it_is_sealed_afterwards(
    tmp_path: Path, begun: Callable[..., tuple[Path, Manifest]], dtype: str, commit_secs: float, threads: int
) -> None:
    late = make_store(tmp_path / "late", stored_dtype=dtype)
    path, target = begun(stored_dtype=dtype)
    with ShardWriter(path, target, rank=0, commit_secs=commit_secs, sealing_threads=threads) as writer:
        for first in (9, 0, 21, 3, 12, 6, 15, 18):  # three rows each, but for the last two
            for point, values in truth(target).items():
                size = min(3, ROWS - first)
                writer.write(point, [Run(first, size)], values[first : first + size])
    assert session.to_seal(path, target)[1] == []
    with place.locked(path):
        assert session.finish(path, target) == late.manifest
    assert tree(path) == tree(late.path)
    assert not verify(path, full=True).findings


def test_what_it_has_not_filled_alone_is_left(begun: Callable[..., tuple[Path, Manifest]]) -> None:
    """Rows 0 to 6 were done before, and of the others another rank writes row 12."""
    path, target = begun()
    states = truth(target)[POINT]
    with ShardWriter(path, target, rank=0) as before:
        before.write(POINT, [Run(0, 7)], states[:7])
    done = {POINT: RowSet([(0, 7)])}
    with (
        ShardWriter(path, target, rank=0, done=done, sealing_threads=2) as writer,
        ShardWriter(path, target, rank=1, done=done, sealing_threads=2) as other,
    ):
        writer.write(POINT, [Run(0, 12)], states[:12])
        other.write(POINT, [Run(12, 1)], states[12:13])
        writer.write(POINT, [Run(13, 10)], states[13:])
    partial = [f"{number:06d}.safetensors.partial" for number in (0, 1, 2)]
    assert names(path) == [*partial, "000003.safetensors", "000004.safetensors"]
    assert {number for _, number in journal.read(path).sealed} == {3, 4}


def test_a_shard_is_named_while_others_are_written(begun: Callable[..., tuple[Path, Manifest]]) -> None:
    path, target = begun()
    sealed, states = threading.Event(), truth(target)[POINT]
    with ShardWriter(
        path, target, rank=0, commit_secs=0.0, sealing_threads=1, progressed=lambda: _note(path, sealed)
    ) as writer:
        writer.write(POINT, [Run(0, SHARD_ROWS)], states[:SHARD_ROWS])
        for row in range(SHARD_ROWS, 2 * SHARD_ROWS - 1):  # each is followed by a commit
            sealed.wait(0.2)
            writer.write(POINT, [Run(row, 1)], states[row : row + 1])
        assert sealed.wait(30)
        assert journal.read(path).rows[POINT].meets(0, SHARD_ROWS)


def _note(path: Path, sealed: threading.Event) -> None:
    if journal.read(path).sealed or "000000.safetensors" in names(path):
        sealed.set()


def test_a_row_written_twice_never_makes_a_shard_whole(begun: Callable[..., tuple[Path, Manifest]]) -> None:
    path, target = begun()
    states = truth(target)[POINT]
    with (
        pytest.raises(CoverageError, match="more than once"),
        ShardWriter(path, target, rank=0, sealing_threads=1) as writer,
    ):
        writer.write(POINT, [Run(0, 4)], states[:4])
        writer.write(POINT, [Run(3, 1)], states[3:4])
    assert names(path) == ["000000.safetensors.partial"] and not journal.read(path).sealed


def test_what_fails_while_a_shard_is_read_fails_the_writer(begun: Callable[..., tuple[Path, Manifest]]) -> None:
    path, target = begun()
    states = truth(target)[POINT]
    file = path / str(POINT) / "000000.safetensors.partial"
    with (
        pytest.raises(CoverageError, match="was changed by something else"),
        ShardWriter(path, target, rank=0, commit_secs=0.0, sealing_threads=1) as writer,
    ):
        writer.write(POINT, [Run(0, 2)], states[:2])
        while not file.exists() or not file.stat().st_size:
            pass
        _spoil_header(writer, file)
        writer.write(POINT, [Run(2, 3)], states[2:5])
    assert not journal.read(path).sealed and file.exists()


def _spoil_header(writer: ShardWriter, file: Path) -> None:
    while not journal.read(file.parents[1]).rows:  # the header is written and durable
        pass
    with open(file, "r+b") as opened:
        opened.write(b"x")


def test_an_abandoned_writer_leaves_no_thread(begun: Callable[..., tuple[Path, Manifest]]) -> None:
    path, target = begun()
    with pytest.raises(StoreError), ShardWriter(path, target, rank=0, sealing_threads=2) as writer:
        writer.write(POINT, [Run(0, 5)], truth(target)[POINT][:5])
        raise StoreError("store.path", "must", "fail")


def test_what_a_crash_leaves_sealed_is_kept(begun: Callable[..., tuple[Path, Manifest]], tmp_path: Path) -> None:
    late = make_store(tmp_path / "late")
    path, target = begun()
    with ShardWriter(path, target, rank=0, sealing_threads=1) as writer:
        for point, values in truth(target).items():
            writer.write(point, [Run(0, 8)], values[:8])
    inode = (path / str(POINT) / "000000.safetensors").stat().st_ino
    with place.locked(path):
        session.resume(path, target, {})
        record, done = session.progress(path, target)
        assert {number for _, number in record.sealed} == {0} and done[POINT] == RowSet([(0, 8)])
        with ShardWriter(path, target, rank=0, done=done, sealing_threads=1) as writer:
            for point, values in truth(target).items():
                writer.write(point, [Run(0, ROWS)], values)
        finish(path, target)
    assert (path / str(POINT) / "000000.safetensors").stat().st_ino == inode
    assert tree(path) == tree(late.path)
