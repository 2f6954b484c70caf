"""Several writers on one shard, and disks that fill up."""

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.write import journal
from tests.store.helpers import POINT, Run, states, stored, writer


def test_threads_that_make_one_shard_at_once(tmp_path: Path) -> None:
    """Creation is idempotent: whoever comes later must not wipe what is there already."""
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        gate = threading.Barrier(6)

        def work(rank: int, folder: Path = folder, gate: threading.Barrier = gate) -> None:
            with writer(folder, shard_rows=12, rank=rank) as out:
                gate.wait()
                out.write(POINT, [Run(row, 1) for row in range(rank, 12, 6)], states()[rank::6])

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(stored(folder), states())


PROCESS = """
import sys
from collections import namedtuple
from pathlib import Path
import torch
from nemo_qwen_hidden.hookpoint import HookPoint
from tests.store.helpers import writer
Run = namedtuple("Run", "first_row length")
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
point = HookPoint("resid_post", 3)
values = torch.arange(2000 * 7, dtype=torch.float32).reshape(2000, 7)
with writer(folder, rank=rank, rows=2000, hidden_size=7, shard_rows=900, options={"commit_secs": 0.01}) as out:
    print("ready", flush=True)
    sys.stdin.readline()
    for row in range(rank, 2000, 2):
        out.write(point, [Run(row, 1)], values[row:row + 1])
"""


def test_two_processes_write_interleaved_rows_of_one_shard(tmp_path: Path, start_python: Callable[..., Any]) -> None:
    ranks = [start_python(PROCESS, tmp_path, rank) for rank in range(2)]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        rank.stdin.write("go\n")
        rank.stdin.flush()
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    expected = torch.arange(2000 * 7, dtype=torch.float32).reshape(2000, 7)
    assert torch.equal(stored(tmp_path), expected)
    found = journal.read(tmp_path)
    assert found.rows == {POINT: RowSet([(0, 2000)])} and not found.twice


FULL = """
import sys
from collections import namedtuple
from pathlib import Path
import torch
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.write import journal
from tests.store.helpers import writer
Run = namedtuple("Run", "first_row length")
folder, point = Path(sys.argv[1]), HookPoint("embed")
sizes = {"rows": 4096, "hidden_size": 256, "shard_rows": 512, "points": [point]}
values = torch.arange(4096 * 256, dtype=torch.float32).reshape(4096, 256)
out = writer(folder, **sizes, options={"commit_secs": 0.0, "queue_bytes": 1})
try:
    for row in range(0, 4096, 64):
        out.write(point, [Run(row, 64)], values[row : row + 64])
    out.close()
except StoreError as error:
    print(error)
claimed = journal.read(folder).rows.get(point)
print(0 if claimed is None else len(claimed))
for first, length in [] if claimed is None else claimed.ranges:
    for row in range(first, first + length):
        with open(folder / f"embed/{row // 512:06d}.safetensors.partial", "rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little") + row % 512 * 1024)
            assert file.read(1024) == values[row].numpy().tobytes(), row
"""


def test_a_file_size_limit_is_a_store_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = writer(tmp_path, rows=1200, shard_rows=1000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        out.write(POINT, [Run(0, 1200)], states(1200))
        said = r"must have room for the store \(File too large while writing resid_post@3\)"
        with pytest.raises(StoreError, match=said):
            out.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert journal.read(tmp_path).rows == {}


def test_a_full_disk_is_a_store_error(small_disk: Callable[..., list[str]]) -> None:
    """And what was claimed before it was full is there."""
    error, claimed = small_disk(FULL)
    assert error.startswith(
        "`store.path` must have room for the store (No space left on device while writing embed), but is"
    )
    assert 0 < int(claimed) < 1024
