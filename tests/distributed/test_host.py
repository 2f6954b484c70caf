"""What Megatron-Core still asks of CUDA on a machine without it; a failure here means that a stand-in can go."""

import pytest
import torch

from nemo_qwen_hidden.parallel.launch import Rank
from tests.conftest import Start


def rotary_with_and_without(rank: Rank) -> tuple[str, str, bool]:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from nemo_qwen_hidden.parallel.host import megatron_on_host

    def device_of() -> str:
        try:
            rotary = RotaryEmbedding(kv_channels=8, rotary_percent=1.0, use_cpu_initialization=True)
            return str(rotary.get_emb(4).device)
        except (AssertionError, RuntimeError) as error:
            return type(error).__name__

    original = torch.cuda.current_device
    alone = device_of()
    with megatron_on_host():
        helped = device_of()
    return alone, helped, torch.cuda.current_device is original


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins do nothing where CUDA is available")
def test_rotary_embedding_needs_the_stand_in(start_ranks: Start) -> None:
    ((alone, helped, restored),) = start_ranks(1, rotary_with_and_without)
    assert alone in ("AssertionError", "RuntimeError")
    assert helped == "cpu"
    assert restored
