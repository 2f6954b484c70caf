"""Any rank writes any rows in any order, and the bytes are those of one array."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.files import write_all
from tests.store.helpers import FINAL, POINT, TORCH, Run, states, stored, writer


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_partition_by_any_writers_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("s")
    rows, hidden_size = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    dtype, shard_rows = data.draw(st.sampled_from(list(TORCH))), data.draw(st.integers(1, 12))
    values = torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, hidden_size)).astype(np.float32))
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=8))})
    runs = data.draw(st.permutations([Run(a, b - a) for a, b in pairwise(cuts)]))
    sizes = {"rows": rows, "hidden_size": hidden_size, "dtype": dtype, "shard_rows": shard_rows, "max_open_files": 2}
    writers = [writer(folder, hook_points=[POINT], **sizes) for _ in range(3)]
    counts: dict[tuple[HookPoint, int], int] = {}
    while runs:
        taken, runs = runs[: (size := data.draw(st.integers(1, len(runs))))], runs[size:]
        picked = torch.cat([values[run.first_row : run.first_row + run.length] for run in taken])
        writers[data.draw(st.integers(0, 2))].write(POINT, taken, picked)
    for each in writers:
        each.close()
        for key, count in each.written.items():
            counts[key] = counts.get(key, 0) + count
    assert torch.equal(stored(folder), values.to(TORCH[dtype]))
    shards = -(-rows // shard_rows)
    assert counts == {(POINT, k): min(shard_rows, rows - k * shard_rows) for k in range(shards)}


def test_headers_say_what_a_shard_is(tmp_path: Path) -> None:
    with writer(tmp_path, dtype="bf16") as out:
        out.write(POINT, [Run(0, 12)], states())
        out.write(FINAL, [Run(10, 2)], states(2))
    with safe_open(tmp_path / "resid_post@3/000001.safetensors.partial", "pt") as file:
        assert file.metadata() == {"hook_point": "resid_post@3", "first_row": "5", "rows": "5", "norm": "before"}
        assert torch.equal(file.get_tensor("resid_post@3"), states()[5:10].bfloat16())
    with safe_open(tmp_path / "final_norm/000002.safetensors.partial", "pt") as file:
        assert file.metadata() == {"hook_point": "final_norm", "first_row": "10", "rows": "2", "norm": "after"}
    assert [path.name for path in (tmp_path / "final_norm").iterdir()] == ["000002.safetensors.partial"]


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", TORCH)
def test_cast_is_that_of_torch(tmp_path: Path, source: torch.dtype, dtype: str) -> None:
    values = torch.randn(12, 3, dtype=torch.float64).to(source)
    with writer(tmp_path, dtype=dtype) as out:
        out.write(POINT, [Run(0, 12)], values.T.contiguous().T)  # any strides
    assert torch.equal(stored(tmp_path), values.to(TORCH[dtype]))


@pytest.mark.parametrize("wrong", [float("inf"), -float("inf"), float("nan")])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, wrong: float) -> None:
    values = states()
    values[7, 1] = wrong
    with writer(tmp_path, dtype="fp32") as out:
        with pytest.raises(
            StoreError, match=r"`precision\.compute` must give finite values; resid_post@3 has none in row 4"
        ):
            out.write(POINT, [Run(9, 3), Run(0, 9)], values)
        assert out.written == {}


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
            "`precision.stored` must hold every value, and at most 65504 fits; resid_post@3 has 70000 in row 4, "
            "but is 'fp16' instead."
        )
        assert out.written == {}
        assert list((tmp_path / "resid_post@3").iterdir()) == []


def test_bf16_overflow_is_found_too(tmp_path: Path) -> None:
    values = states()
    values[11, 2] = torch.finfo(torch.float32).max
    with writer(tmp_path, dtype="bf16") as out, pytest.raises(StoreError, match=r"has 3\.40282e\+38 in row 11"):
        out.write(POINT, [Run(0, 12)], values)


def test_rows_written_twice_count_twice(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(POINT, [Run(3, 4)], states(4))
        out.write(POINT, [Run(3, 1)], states(1))
        out.write(POINT, [], states(0))
        assert out.written == {(POINT, 0): 3, (POINT, 1): 2}
        out.written.clear()
        assert len(out.written) == 2


@pytest.mark.parametrize(
    ("point", "runs", "values", "message"),
    [
        (HookPoint("embed"), [Run(0, 12)], states(), "embed is not one of the hook points"),
        (POINT, [Run(0, 11)], states(), r"values of these runs must be \[11, 3\], but are \[12, 3\]"),
        (POINT, [Run(0, 12)], states(12, 4), r"must be \[12, 3\], but are \[12, 4\]"),
        (POINT, [Run(1, 12)], states(), r"rows 1 \+ 12 do not lie within 12 rows"),
        (POINT, [Run(-1, 12)], states(), r"rows -1 \+ 12 do not lie within 12 rows"),
        (POINT, [Run(0, 13), Run(5, -1)], states(), "do not lie within"),
        (POINT, [Run(0, 12)], states().int(), "must be floats on the CPU, but are torch.int32 on cpu"),
        (POINT, [Run(0, 12)], states().to("meta"), "must be floats on the CPU, but are torch.float32 on meta"),
    ],
)
def test_misuse(tmp_path: Path, point: HookPoint, runs: list[Run], values: torch.Tensor, message: str) -> None:
    with writer(tmp_path) as out:
        with pytest.raises(ValueError, match=message):
            out.write(point, runs, values)
        assert out.written == {}


def test_a_closed_writer_stays_closed(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write(POINT, [Run(0, 12)], states())
    out.close()
    out.close()
    with pytest.raises(ValueError, match="the writer is closed"):
        out.write(POINT, [Run(0, 12)], states())


def test_files_kept_open_are_bounded(tmp_path: Path) -> None:
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir()))
    with writer(tmp_path, shard_rows=1, max_open_files=4) as out:
        out.write(POINT, [Run(0, 12)], states())
        out.write(POINT, [Run(0, 6)], states(6))
        assert len(list(opened.iterdir())) == before + 4
    assert len(list(opened.iterdir())) == before
    assert torch.equal(stored(tmp_path), states())


def test_nothing_stays_open_after_a_failure(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(RuntimeError, match="boom"), writer(tmp_path) as out:
        out.write(POINT, [Run(0, 12)], states())
        raise RuntimeError("boom")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_close_says_that_a_file_is_gone(tmp_path: Path) -> None:
    out = writer(tmp_path, shard_rows=1, max_open_files=1)
    out.write(POINT, [Run(0, 12)], states())
    (tmp_path / "resid_post@3/000000.safetensors.partial").unlink()
    with pytest.raises(FileNotFoundError):
        out.close()


def test_close_raises_what_fsync_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    out = writer(tmp_path)
    out.write(POINT, [Run(0, 12)], states())
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        out.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:7], offset))
    with writer(tmp_path) as out:
        out.write(POINT, [Run(0, 12)], states())
    assert torch.equal(stored(tmp_path), states())


def test_a_disk_that_takes_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.pwrite", lambda descriptor, data, offset: 0)
    with pytest.raises(OSError, match="nothing was written"):
        write_all(0, b"x", 0)


def test_a_symbolic_link_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with writer(tmp_path) as out:
        (tmp_path / "resid_post@3/000000.safetensors.partial").symlink_to(victim)
        with pytest.raises(OSError, match="symbolic links"):
            out.write(POINT, [Run(0, 12)], states())
    assert victim.read_text() == "precious"
