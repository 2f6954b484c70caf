"""``forward`` with NeMo's signature gives decoder outputs, and the mask that NeMo's data gives changes nothing."""

from pathlib import Path

import numpy as np
import torch

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import TINY, Tiny, ragged_batch, relative_error, transformers_states
from tests.support.ranks import forward_outputs, losses, open_files_of_models


def test_forward_gives_the_normed_state(tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    folder, batch = tiny_folders[TINY[1]], ragged_batch((12, 12))
    ((causal, masked, refused),) = start_ranks(1, forward_outputs, Topology(), folder, batch)
    for row, states in enumerate(transformers_states(folder, batch)):
        assert relative_error(torch.from_numpy(causal[:, row]), states[HookPoint("final_norm")]) <= 5e-6
    assert np.allclose(causal, masked, atol=1e-5)
    assert refused.startswith("`labels` need a model that was configured with `output_layer=True`")


def test_with_an_output_layer_labels_give_the_loss(tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    """Untied and tied, against transformers' logits. One rank: tp pads the odd vocabulary of these models, and
    Megatron's loss counts the padding."""
    from transformers import AutoModelForCausalLM

    batch, fitting = ragged_batch((12, 12)), [tiny_folders[TINY[0]], tiny_folders[TINY[1]]]
    (found,) = start_ranks(1, losses, Topology(), fitting, batch)
    for folder, loss in zip(fitting, found, strict=True):
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(batch.input_ids).logits.detach()
        labels = batch.input_ids.roll(-1, dims=1)
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        assert np.allclose(loss, expected.numpy(), rtol=1e-5)


def test_models_in_one_process_share_its_process_groups(tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    ((after_one, after_five),) = start_ranks(1, open_files_of_models, tiny_folders[TINY[1]], 5)
    assert after_five == after_one
