"""One hash of all weights, and the final norm's weight."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_qwen_hidden.checkpoint.fingerprint import final_norm_weight, weights_sha256
from nemo_qwen_hidden.checkpoint.tensors import TensorFiles
from tests.support.models import TINY, Tiny, save_tiny


def fingerprint(folder: Path) -> str:
    return weights_sha256(TensorFiles.of(folder))


@pytest.fixture
def folder(tiny_folders: dict[Tiny, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folders[TINY[0]], tmp_path / "model"))


def test_the_division_into_files_does_not_matter(folder: Path, tmp_path: Path) -> None:
    parts = save_tiny(tmp_path / "parts", TINY[0], max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert fingerprint(parts) == fingerprint(folder)


def test_every_bit_of_every_tensor_matters_but_those_of_the_output_layer(folder: Path) -> None:
    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        changed = {key: value.clone() for key, value in tensors.items()}
        changed[name].view(torch.int32).reshape(-1)[-1] ^= 1
        save_file(changed, folder / "model.safetensors")
        assert (fingerprint(folder) == before) == (name == "lm_head.weight"), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_final_norm_is_read_exactly(dtype: torch.dtype, folder: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    expected = tensors["model.norm.weight"].float().numpy()
    found = final_norm_weight(TensorFiles.of(folder))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == len(found)
