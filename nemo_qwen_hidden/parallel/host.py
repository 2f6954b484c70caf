"""Megatron-Core on a machine without a GPU.

Every stand-in is here, is entered explicitly, is undone on the way out, and does nothing where CUDA is available.
Each names the upstream version that it is for; ``tests/distributed/test_host.py`` fails when upstream stops needing it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rotary_pos_embedding
from torch import Tensor


def device() -> torch.device:
    """The device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def megatron_on_host() -> Iterator[None]:
    """While entered, ``torch.cuda.current_device()`` answers with the CPU device.

    megatron-core 0.16.1 asks it for the device of new tensors: ``rotary_pos_embedding.py:162``,
    ``tensor_parallel/mappings.py:91,141,181``, ``tensor_parallel/layers.py:552``, ``utils.py:631``. Under context
    parallelism it pins memory and copies it to the GPU to choose rotary embeddings (``rope_utils.py:62``). It moves the
    output layer's weight to the GPU where the last stage shares it with the first (``language_module.py:244``).
    """
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(Tensor, "cuda", lambda tensor: tensor),
        mock.patch.object(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _rotary_of_cp_rank),
    ):
        yield


def _rotary_of_cp_rank(rotary: Tensor, dimension: int, cp: dist.ProcessGroup) -> Tensor:
    """The chunks of a context-parallel rank, as Megatron chooses them."""
    chunks = rotary.chunk(2 * cp.size(), dim=dimension)
    return torch.cat([chunks[cp.rank()], chunks[2 * cp.size() - 1 - cp.rank()]], dim=dimension)
