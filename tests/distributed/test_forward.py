"""``forward`` with NeMo's signature gives decoder outputs, and the mask that NeMo's data gives changes nothing."""

from pathlib import Path

import numpy as np
import torch

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import TINY, Tiny, ragged_batch, relative_error, transformers_states
from tests.support.ranks import forward_outputs


def test_forward_gives_the_normed_state(tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    folder, batch = tiny_folders[TINY[1]], ragged_batch((12, 12))
    ((causal, masked, refused),) = start_ranks(1, forward_outputs, Topology(), folder, batch)
    for row, states in enumerate(transformers_states(folder, batch)):
        assert relative_error(torch.from_numpy(causal[:, row]), states[HookPoint("final_norm")]) <= 5e-6
    assert np.allclose(causal, masked, atol=1e-5)
    assert refused.startswith("`labels` need a model that was configured with `output_layer=True`")
