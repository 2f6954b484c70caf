"""What is found on this machine, with and without a launcher. GPUs: tests/gpu/test_machine.py."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from nemo_qwen_hidden.config import ParallelSettings, Settings
from nemo_qwen_hidden.parallel import machine
from nemo_qwen_hidden.parallel.machine import find_machine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs are found before cores")

CORES = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A control group that this test may limit."""
    monkeypatch.setattr(machine, "_CGROUP_LIMIT", tmp_path / "memory.max")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "memory.max"


def test_up_to_one_rank_a_core_share_what_is_free() -> None:
    found = find_machine(Settings(), world=None)
    assert (found.world, found.per_machine, found.worlds) == (None, CORES, range(1, CORES + 1))
    assert found.memory_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert found.rank_bytes(1) == found.memory_bytes
    assert found.rank_flops(CORES) == pytest.approx(found.rank_flops(1) / CORES)
    assert found.rank_bytes(CORES) == found.memory_bytes // CORES


def test_ranks_of_a_launcher_find_the_same_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    found = find_machine(Settings(), world=6)
    assert (found.world, found.per_machine, list(found.worlds)) == (6, 3, [6])
    assert found.memory_bytes == psutil.virtual_memory().total
    assert found.rank_bytes(6) == found.memory_bytes // 3


def test_memory_as_given_is_each_ranks() -> None:
    found = find_machine(Settings(parallel=ParallelSettings(memory_gb=1.5)), world=None)
    assert found.rank_bytes(1) == found.rank_bytes(CORES) == 1_500_000_000


@pytest.mark.parametrize(("limit", "expected"), [("1000000\n", 1_000_000), ("max\n", None)])
def test_the_limit_of_a_container(no_limit: Path, limit: str, expected: int | None) -> None:
    no_limit.write_text(limit)
    assert find_machine(Settings(), world=1).memory_bytes == (expected or psutil.virtual_memory().total)
