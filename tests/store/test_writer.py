"""Any rank writes any rows in any order, and the bytes are those of one array."""

import os
import threading
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from nemo_qwen_hidden.errors import CoverageError, StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.files import write_all
from nemo_qwen_hidden.store.format import DTYPES
from nemo_qwen_hidden.store.shard import header_of
from nemo_qwen_hidden.store.statistics import StoredError
from nemo_qwen_hidden.store.write import journal
from tests.store.helpers import (
    FINAL,
    POINT,
    TORCH,
    Run,
    draft,
    empty_part,
    shard_files,
    states,
    stored,
    target_of,
    writer,
)


def as_stored(values: NDArray[np.float32], dtype: str) -> tuple[bytes, bytes]:
    """The bytes of the values and of the scales as the format demands them, by numpy's arithmetic."""
    if dtype == "fp32":
        return values.astype("<f4").tobytes(), b""
    if dtype == "fp16":
        return values.astype("<f2").tobytes(), b""
    if dtype == "bf16":  # to the nearest, ties to even, by the bits
        bits = values.astype("<f4").view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes(), b""
    scale = np.abs(values).max(axis=1) / np.float32(127)
    safe = np.where(scale == 0, np.float32(1), scale)
    return np.rint(values / safe[:, None]).astype("i1").tobytes(), scale.astype("<f4").tobytes()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_partition_by_any_writers_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Over parts of different shard sizes, for every dtype, with some rows done before."""
    folder = tmp_path_factory.mktemp("s")
    parts, first = [], 0
    for rows, shard_rows in data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1)):
        parts.append(empty_part(rows, shard_rows=shard_rows, first_row=first))
        first += rows
    dtype, hidden_size = data.draw(st.sampled_from(list(DTYPES))), data.draw(st.integers(1, 4))
    target = draft(*parts, points=[POINT], stored_dtype=dtype, hidden_size=hidden_size)
    values = np.random.default_rng(first).standard_normal((first, hidden_size)).astype(np.float32)
    cuts = sorted({0, first, *data.draw(st.lists(st.integers(0, first), max_size=8))})
    runs = data.draw(st.permutations([Run(a, b - a) for a, b in pairwise(cuts)]))
    done = RowSet((run.first_row, run.length) for run in data.draw(st.lists(st.sampled_from(runs), max_size=2)))
    options = {"max_open_files": 2, "commit_secs": data.draw(st.sampled_from([0.0, 100.0]))}
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(writer(folder, target, rank=rank, done={POINT: done}, options=options))
            for rank in range(3)
        ]
        left = list(runs)
        while left:
            taken, left = left[: (size := data.draw(st.integers(1, len(left))))], left[size:]
            picked = np.concatenate([values[run.first_row : run.first_row + run.length] for run in taken])
            ranks[data.draw(st.integers(0, 2))].write(POINT, taken, torch.from_numpy(picked))
    expected = [bytearray(header_of((POINT, number), target)[1].size_bytes) for number in range(target.grid.shards)]
    for row in set(range(first)) - {row for begin, length in done.ranges for row in range(begin, begin + length)}:
        number = target.grid.shard_of(row)
        start, header = header_of((POINT, number), target)
        inside, (stored_row, scale) = row - target.grid.starts[number], as_stored(values[row : row + 1], dtype)
        expected[number][: len(start)] = start
        for tensor, found in ((str(POINT), stored_row), ("scale", scale)):
            if found:
                at = header.offsets[tensor] + inside * len(found)
                expected[number][at : at + len(found)] = found
    files = {int(path.name[:6]): path for path in (folder / str(POINT)).iterdir()} if any(map(any, expected)) else {}
    for number, wanted in enumerate(expected):
        assert number not in files or files[number].read_bytes() == bytes(wanted)
        assert number in files or not any(wanted)
    claimed = journal.read(folder)
    assert claimed.rows.get(POINT, RowSet()) == RowSet(done.complement(0, first).ranges) and not claimed.twice
    if DTYPES[dtype].name != "fp32":
        assert sum(error.rows for error in claimed.errors.values()) == first - len(done)


def test_headers_say_what_a_shard_is(tmp_path: Path) -> None:
    with writer(tmp_path, dtype="bf16") as out:
        out.write(POINT, [Run(0, 12)], states())
        out.write(FINAL, [Run(10, 2)], states(2))
    part = {"part": "0" * 64}
    with safe_open(tmp_path / "resid_post@3/000001.safetensors.partial", "pt") as file:
        assert file.metadata() == {"hook_point": "resid_post@3", "first_row": "5", "rows": "5", "norm": "before"} | part
        assert torch.equal(file.get_tensor("resid_post@3"), states()[5:10].bfloat16())
    with safe_open(tmp_path / "final_norm/000002.safetensors.partial", "pt") as file:
        assert file.metadata() == {"hook_point": "final_norm", "first_row": "10", "rows": "2", "norm": "after"} | part
    assert [path.name for path in (tmp_path / "final_norm").iterdir()] == ["000002.safetensors.partial"]


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", TORCH)
def test_cast_is_that_of_torch(tmp_path: Path, source: torch.dtype, dtype: str) -> None:
    values = torch.randn(12, 3, dtype=torch.float64).to(source)
    with writer(tmp_path, dtype=dtype) as out:
        out.write(POINT, [Run(0, 12)], values.T.contiguous().T)  # any strides
    assert torch.equal(stored(tmp_path), values.to(TORCH[dtype]))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_what_storing_costs_is_what_numpy_says(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Relative errors of rows by shard, computed from the bytes on disk in float64."""
    folder, dtype = tmp_path_factory.mktemp("s"), data.draw(st.sampled_from(["bf16", "fp16", "int8"]))
    seed, size = data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([1e-3, 1.0, 50.0]))
    values = (np.random.default_rng(seed).standard_normal((12, 7)) * size).astype(np.float32)
    values[seed % 12] = 0  # costs nothing, and is counted
    with writer(folder, hidden_size=7, dtype=dtype, points=[POINT]) as out:
        out.write(POINT, [Run(4, 8), Run(0, 4)], torch.from_numpy(np.roll(values, 8, axis=0)))
    read = stored(folder).double().numpy()
    if dtype == "int8":
        read = (read.astype(np.float32) * stored(folder, tensor="scale").numpy()[:, None]).astype(np.float64)
    exact = values.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1)
    relative = np.divide(np.linalg.norm(read - exact, axis=1), norms, out=np.zeros(12), where=norms > 0)
    found = journal.read(folder).errors
    for number, rows in enumerate((range(5), range(5, 10), range(10, 12))):
        error = found[POINT, number]
        assert error.rows == len(rows)
        assert error.max == pytest.approx(relative[rows].max(), rel=1e-4)
        assert error.rms == pytest.approx(np.sqrt((relative[rows] ** 2).mean()), rel=1e-4, abs=1e-7)
    total = found[POINT, 0] + found[POINT, 1] + found[POINT, 2]
    assert total == found[POINT, 2] + (found[POINT, 1] + found[POINT, 0])
    assert total.rms == pytest.approx(np.sqrt((relative**2).mean()), rel=1e-4, abs=1e-7)


def test_nothing_is_lost_by_a_dtype_that_holds_all(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(POINT, [Run(0, 12)], states().bfloat16())
    assert journal.read(tmp_path).errors == {}


@pytest.mark.parametrize("wrong", [float("inf"), -float("inf"), float("nan")])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, wrong: float) -> None:
    values = states()
    values[7, 1] = wrong
    with (
        writer(tmp_path) as out,
        pytest.raises(StoreError, match=r"`precision\.compute` must give finite values; resid_post@3 row 4 has others"),
    ):
        out.write(POINT, [Run(9, 3), Run(0, 9)], values)
    assert journal.read(tmp_path).rows == {}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_is_not_finite_can_be_kept(tmp_path: Path, dtype: str) -> None:
    values = states()
    values[7] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    with writer(tmp_path, dtype=dtype, options={"nonfinite": "keep"}) as out:
        out.write(POINT, [Run(0, 12)], values)
    assert torch.equal(stored(tmp_path).nan_to_num(7), values.to(TORCH[dtype]).nan_to_num(7))


def test_int8_cannot_keep_what_is_not_finite(tmp_path: Path) -> None:
    values = states()
    values[7, 1] = float("nan")
    said = "must give finite values; resid_post@3 row 7 has others"
    with writer(tmp_path, dtype="int8", options={"nonfinite": "keep"}) as out, pytest.raises(StoreError, match=said):
        out.write(POINT, [Run(0, 12)], values)


def test_gradients_are_left_behind(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(POINT, [Run(0, 12)], states().requires_grad_())
    assert torch.equal(stored(tmp_path), states())


def test_fp16_overflow_names_hook_point_and_row(tmp_path: Path) -> None:
    values = states()
    values[7, 1] = -70000.0
    with writer(tmp_path, dtype="fp16") as out:
        with pytest.raises(StoreError) as caught:
            out.write(POINT, [Run(9, 3), Run(0, 9)], values)
        assert str(caught.value) == (
            "`precision.stored` must hold every value, and at most 65504 fits; resid_post@3 row 4 has 70000, "
            "but is 'fp16' instead."
        )
    assert not (tmp_path / "resid_post@3").exists()


def test_bf16_overflow_is_found_too(tmp_path: Path) -> None:
    values = states()
    values[11, 2] = torch.finfo(torch.float32).max
    with writer(tmp_path, dtype="bf16") as out, pytest.raises(StoreError, match=r"row 11 has 3\.40282e\+38"):
        out.write(POINT, [Run(0, 12)], values)


def test_rows_that_are_there_are_passed_over(tmp_path: Path) -> None:
    """Not one byte of them is touched: another rank's journal speaks for them."""
    with writer(tmp_path) as out:
        out.write(POINT, [Run(0, 12)], states())
    with writer(tmp_path, rank=1, done={POINT: RowSet([(2, 7)])}) as out:
        out.write(POINT, [Run(0, 12)], -states())
    expected = -states()
    expected[2:9] = states()[2:9]
    assert torch.equal(stored(tmp_path), expected)


def test_a_row_written_twice_by_one_rank_is_a_fault(tmp_path: Path) -> None:
    said = "states of resid_post@3 were written more than once by one rank"
    with pytest.raises(CoverageError, match=said), writer(tmp_path) as out:
        out.write(POINT, [Run(3, 4)], states(4))
        out.write(POINT, [Run(3, 1)], states(1))
    assert journal.read(tmp_path).rows == {}


def test_a_row_written_twice_by_two_ranks_is_seen(tmp_path: Path) -> None:
    for rank in range(2):
        with writer(tmp_path, rank=rank) as out:
            out.write(POINT, [Run(3, 4)], states(4))
    assert journal.read(tmp_path).twice == {POINT}


@pytest.mark.parametrize(
    ("point", "runs", "values", "message"),
    [
        (HookPoint("embed"), [Run(0, 12)], states(), "embed is not one of the hook points"),
        (
            POINT,
            [Run(0, 11)],
            states(),
            r"values of resid_post@3 must be \[11, 3\], as its entry and these runs say, but are \[12, 3\]",
        ),
        (POINT, [Run(0, 12)], states(12, 4), r"must be \[12, 3\], .* but are \[12, 4\]"),
        (POINT, [Run(1, 12)], states(), r"states 1 \+ 12 do not lie within 12"),
        (POINT, [Run(-1, 12)], states(), r"states -1 \+ 12 do not lie within 12"),
        (POINT, [Run(0, 13), Run(5, -1)], states(), "do not lie within"),
        (POINT, [Run(0, 12)], states().int(), "must be floats on the CPU, but are torch.int32 on cpu"),
        (POINT, [Run(0, 12)], states().to("meta"), "must be floats on the CPU, but are torch.float32 on meta"),
    ],
)
def test_misuse(tmp_path: Path, point: HookPoint, runs: list[Run], values: torch.Tensor, message: str) -> None:
    with writer(tmp_path) as out, pytest.raises(ValueError, match=message):
        out.write(point, runs, values)
    assert journal.read(tmp_path).rows == {} and not (tmp_path / "resid_post@3").exists()


def test_a_closed_writer_stays_closed(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write(POINT, [Run(0, 12)], states())
    out.close()
    out.close()
    with pytest.raises(ValueError, match="the writer is closed"):
        out.write(POINT, [Run(0, 12)], states())


def test_files_kept_open_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, counts = Path("/proc/self/fd"), []
    before, pwrite = len(list(opened.iterdir())), os.pwrite

    def counted(descriptor: int, data: Any, offset: int) -> int:
        counts.append(len(list(opened.iterdir())))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr("os.pwrite", counted)
    with writer(tmp_path, shard_rows=1, options={"max_open_files": 4}) as out:
        out.write(POINT, [Run(0, 12)], states())
        out.write(FINAL, [Run(0, 6)], states(6))
    assert max(counts) <= before + 4 + 2  # the journal and the lock
    assert len(list(opened.iterdir())) == before
    assert torch.equal(stored(tmp_path), states())


def test_nothing_stays_open_after_a_failure(tmp_path: Path) -> None:
    before, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    with pytest.raises(RuntimeError, match="boom"), writer(tmp_path) as out:
        out.write(POINT, [Run(0, 12)], states())
        raise RuntimeError("boom")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert threading.active_count() == threads


def test_close_says_that_a_file_is_gone(tmp_path: Path) -> None:
    taken = threading.Semaphore(0)
    options = {"max_open_files": 1, "progressed": taken.release}
    out = writer(tmp_path, shard_rows=1, points=[POINT], options=options)
    out.write(POINT, [Run(0, 12)], states())
    assert taken.acquire(timeout=30)
    (tmp_path / "resid_post@3/000000.safetensors.partial").unlink()
    with pytest.raises(StoreError, match=r"must stay where it is while it is written \(No such file or directory"):
        out.close()
    assert journal.read(tmp_path).rows == {}


def test_a_store_that_has_vanished_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    out = writer(folder, points=[POINT])
    out.write(POINT, [Run(0, 12)], states())
    for path in (folder / "journal").iterdir():
        path.unlink()
    with pytest.raises(StoreError, match="must stay where it is while it is written") as caught:
        out.close()
    assert caught.value.setting == "store.path" and caught.value.value == str(folder)


def fail(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def test_close_raises_what_fsync_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = writer(tmp_path)
    out.write(POINT, [Run(0, 12)], states())
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        out.close()
    assert journal.read(tmp_path).rows == {}


def test_an_error_of_the_disk_thread_is_raised_by_every_later_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a caller that swallows it once would wait for a thread that has gone, or take rows for written."""
    out = writer(tmp_path, options={"queue_bytes": 36})
    monkeypatch.setattr("os.pwrite", fail)
    with pytest.raises(OSError, match="Input/output error"):
        for row in range(12):
            out.write(POINT, [Run(row, 1)], states(1))
    for row in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            out.write(POINT, [Run(row, 1)], states(1))
    with pytest.raises(OSError, match="Input/output error"):
        out.close()


def test_memory_of_rows_that_wait_for_a_slow_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``write`` blocks where one more batch would go beyond the limit, and goes on when the disk has taken one."""
    free, pwrite, waiting = threading.Semaphore(0), os.pwrite, threading.Event()

    def slow(descriptor: int, data: Any, offset: int) -> int:
        waiting.set()
        assert free.acquire(timeout=30)
        return pwrite(descriptor, data, offset)

    row_bytes, handed = 3 * 4, []
    out = writer(tmp_path, points=[POINT], shard_rows=12, options={"queue_bytes": 3 * row_bytes})
    monkeypatch.setattr("os.pwrite", slow)

    def hand_out() -> None:
        for row in range(12):
            out.write(POINT, [Run(row, 1)], states()[row : row + 1])
            handed.append(row)

    giver = threading.Thread(target=hand_out)
    giver.start()
    assert waiting.wait(30)
    giver.join(0.1)
    assert len(handed) == 3  # the first stands before the disk, and counts until it is there
    assert out._disk._queued_bytes == 3 * row_bytes
    taken = 0
    while giver.is_alive():
        free.release()
        taken += 1
        giver.join(0.02)
        assert out._disk._queued_bytes <= 3 * row_bytes and len(handed) <= 3 + taken
    for _ in range(100):
        free.release()
    out.close()
    assert torch.equal(stored(tmp_path), states())


def test_a_batch_larger_than_the_queue_is_written(tmp_path: Path) -> None:
    with writer(tmp_path, options={"queue_bytes": 1}) as out:
        out.write(POINT, [Run(0, 6)], states(6))
        out.write(POINT, [Run(6, 6)], states()[6:])
    assert torch.equal(stored(tmp_path), states())


def test_what_is_committed_is_read_while_others_write(tmp_path: Path) -> None:
    done = threading.Semaphore(0)
    with writer(tmp_path, options={"commit_secs": 0.0, "progressed": done.release}) as out:
        out.write(POINT, [Run(2, 5)], states(5))
        for _ in range(2):  # written, then synced
            assert done.acquire(timeout=30)
        while not (found := journal.read(tmp_path).rows):
            pass
        assert found == {POINT: RowSet([(2, 5)])}


def test_a_writer_with_nothing_to_do_does_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    with writer(tmp_path, options={"commit_secs": 0.0}) as out:
        wait_for = out._disk._next
        monkeypatch.setattr(out._disk, "_next", lambda patience: looks.append(patience) or wait_for(patience))
        out.write(POINT, [Run(0, 12)], states())
        threading.Event().wait(0.05)
    assert len(looks) < 10


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:7], offset))
    with writer(tmp_path) as out:
        out.write(POINT, [Run(0, 12)], states())
    assert torch.equal(stored(tmp_path), states())
    assert journal.read(tmp_path).rows == {POINT: RowSet([(0, 12)])}


def test_a_disk_that_takes_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.pwrite", lambda descriptor, data, offset: 0)
    with pytest.raises(OSError, match="nothing was written"):
        write_all(0, b"x", 0)


def test_a_symbolic_link_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "resid_post@3").mkdir()
    (tmp_path / "resid_post@3/000000.safetensors.partial").symlink_to(victim)
    out = writer(tmp_path)
    out.write(POINT, [Run(0, 12)], states())
    with pytest.raises(OSError, match="symbolic links"):
        out.close()
    assert victim.read_text() == "precious"


def test_errors_of_no_rows_are_nothing() -> None:
    nothing = StoredError.of(np.zeros(0))
    assert (nothing.rows, nothing.rms, nothing.max) == (0, 0.0, 0.0)


def test_a_rank_without_rows_makes_no_shard(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(POINT, [], states(0))
        out.write(POINT, [Run(4, 0)], states(0))
    assert not (tmp_path / str(POINT)).exists() and journal.read(tmp_path).rows == {}


def test_several_shards_of_one_write(tmp_path: Path) -> None:
    with writer(tmp_path, shard_rows=2) as out:
        out.write(POINT, [Run(1, 9)], states(9))
    assert [path.name[:6] for path in shard_files(tmp_path)] == [f"{number:06d}" for number in range(5)]
    assert torch.equal(stored(tmp_path)[1:10], states(9))


def test_divisors_are_written_beside_the_rows_and_checked_first(tmp_path: Path) -> None:
    plain = target_of()
    points = tuple(replace(entry, divisor=entry.point == FINAL) for entry in plain.hook_points)
    target = replace(plain, hook_points=points)
    divisor = torch.arange(24, dtype=torch.float32)[::2]  # not contiguous
    with writer(tmp_path, target) as open_writer:
        wrong = (None, divisor[:5], divisor.double(), divisor.reshape(3, 4))
        for bad in wrong:
            with pytest.raises(ValueError, match=r"divisors .*must be"):
                open_writer.write(FINAL, [Run(0, 12)], states(), bad)
        with pytest.raises(ValueError, match=r"divisors of resid_post@3 must be None"):
            open_writer.write(POINT, [Run(0, 12)], states(), divisor)
        open_writer.write(FINAL, [Run(0, 12)], states(), divisor)
    assert torch.equal(stored(tmp_path, FINAL, tensor="divisor"), divisor)
    assert torch.equal(stored(tmp_path, FINAL), states())
