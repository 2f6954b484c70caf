"""The GPUs that are found, and their memory."""

import pytest
import torch

from nemo_qwen_hidden.config import Settings
from nemo_qwen_hidden.parallel.machine import find_machine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_one_rank_for_each_gpu_with_what_is_free_on_the_fullest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    gpus = range(torch.cuda.device_count())
    found = find_machine(Settings(), world=None)
    assert (found.world, found.per_machine, found.shared_cores) == (None, len(gpus), False)
    assert found.memory_bytes == pytest.approx(min(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus), rel=0.1)


def test_ranks_of_a_launcher_take_what_their_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert find_machine(Settings(), world=1).memory_bytes == torch.cuda.mem_get_info(0)[1]
