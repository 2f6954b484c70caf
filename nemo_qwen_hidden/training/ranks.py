"""A rank that our fork server has started, as Lightning and NeMo know ranks: by torchrun's environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from nemo_qwen_hidden.parallel.launch import Rank


@contextmanager
def as_if_torchrun(rank: Rank) -> Iterator[None]:
    """While entered, Lightning takes this process for a rank that torchrun has started, and starts none itself.

    No port is opened: ranks meet in the file ``rank.rendezvous``, which ``megatron_strategy`` takes.
    """
    environment = {
        "RANK": rank.rank,
        "LOCAL_RANK": rank.rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": rank.world,
        "LOCAL_WORLD_SIZE": rank.world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
        "TORCHELASTIC_RUN_ID": "none",
    }
    with mock.patch.dict(os.environ, {name: str(value) for name, value in environment.items()}):
        yield
