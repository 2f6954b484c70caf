"""Megatron-Core on a machine without a GPU.

Every stand-in is here, is entered explicitly, is undone on the way out, and does nothing where CUDA is available.
Each names the upstream version that it is for; ``tests/distributed/test_host.py`` fails when upstream stops needing it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


def device() -> torch.device:
    """The device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def megatron_on_host() -> Iterator[None]:
    """While entered, ``torch.cuda.current_device()`` answers with the CPU device.

    megatron-core 0.16.1 asks it for the device of new tensors: ``rotary_pos_embedding.py:162``,
    ``tensor_parallel/mappings.py:91,141,181``, ``tensor_parallel/layers.py:552``, ``utils.py:631``.
    """
    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")):
        yield
