"""Which file holds each tensor, what is refused by reading headers alone, and slices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from nemo_qwen_hidden.checkpoint.tensors import TensorFiles, expected_shapes
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError
from nemo_qwen_hidden.plan.footprint import DecoderShape

SHAPE = DecoderShape(
    num_layers=2, hidden_size=8, num_heads=4, num_query_groups=2, head_dim=2, ffn_hidden_size=12, vocab_size=10
)
Tensors = dict[str, NDArray[Any]]


def tensors(prefix: str = "model.") -> Tensors:
    """Every tensor of ``SHAPE``, each number different."""
    made: Tensors = {}
    for name, size in expected_shapes(SHAPE).items():
        made[prefix + name] = (np.arange(np.prod(size), dtype=np.float32) + 1000 * len(made)).reshape(size)
    return made


def save(folder: Path, saved: Tensors) -> TensorFiles:
    save_file(saved, folder / "model.safetensors")
    return TensorFiles.of(folder)


def save_indexed(folder: Path, saved: Tensors) -> dict[str, str]:
    """Two files by turns, and their index; gives the index."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {name: names[number % 2] for number, name in enumerate(saved)}
    for file in names:
        save_file({name: saved[name] for name in saved if index[name] == file}, folder / file)
    write_index(folder, {"weight_map": index})
    return index


def write_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_the_tensors_of_a_decoder() -> None:
    shapes = expected_shapes(SHAPE)
    assert len(shapes) == 2 + 2 * 12
    assert shapes["embed_tokens.weight"] == (10, 8)
    assert shapes["layers.1.self_attn.k_proj.weight"] == (4, 8)
    assert shapes["layers.1.self_attn.q_proj.bias"] == (8,)
    assert shapes["layers.0.mlp.down_proj.weight"] == (8, 12)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_slices_of_one_file(tmp_path: Path, prefix: str) -> None:
    saved = tensors(prefix)
    files = save(tmp_path, saved)
    files.check(SHAPE)
    name = "layers.1.mlp.down_proj.weight"
    with files.reader() as reader:
        assert name in reader
        assert set(reader) == set(expected_shapes(SHAPE))
        assert np.array_equal(reader.read(name).numpy(), saved[prefix + name])
        assert np.array_equal(reader.read(name, slice(2, 4)).numpy(), saved[prefix + name][2:4])
        part = reader.read(name, slice(None), slice(3, 9)).numpy()
        assert np.array_equal(part, saved[prefix + name][:, 3:9])


def test_slices_of_an_indexed_set(tmp_path: Path) -> None:
    saved = tensors() | {"lm_head.weight": np.zeros((10, 8), np.float32)}
    save_indexed(tmp_path, saved)
    files = TensorFiles.of(tmp_path)
    files.check(SHAPE)
    with files.reader() as reader:
        for name in expected_shapes(SHAPE):
            assert np.array_equal(reader.read(name).numpy(), saved["model." + name])
        assert reader.read("lm_head.weight").shape == (10, 8)


def test_what_old_transformers_saved_beside_the_weights(tmp_path: Path) -> None:
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(1, np.float32)}
    save(tmp_path, tensors() | derived).check(SHAPE)


def test_a_missing_tensor_is_named_as_the_file_would(tmp_path: Path) -> None:
    saved = tensors()
    del saved["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"`model.path` must hold the tensor `model.norm.weight`, but is"):
        save(tmp_path, saved).check(SHAPE)
    del saved["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"must hold the tensor `model.embed_tokens.weight` and 1 more, but is"):
        save(tmp_path, saved).check(SHAPE)


def test_a_wrong_shape(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    said = rf"`model.path: {name}` must have shape \[4, 8\] by config.json, but is \[6, 8\]"
    with pytest.raises(CheckpointError, match=said):
        save(tmp_path, tensors() | {name: np.zeros((6, 8), np.float32)}).check(SHAPE)


def test_a_model_with_more_than_a_qwen2_has(tmp_path: Path) -> None:
    saved = tensors() | {"model.layers.1.self_attn.q_norm.weight": np.zeros(2, np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"have no tensor `model.layers.1.self_attn.q_norm.weight`"):
        save(tmp_path, saved).check(SHAPE)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    saved = tensors() | {"model.norm.weight": np.zeros(8, np.int8)}
    with pytest.raises(UnsupportedModelError, match=r"model.norm.weight` must be one of F32, BF16, F16, but is 'I8'"):
        save(tmp_path, saved).check(SHAPE)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold model.safetensors or model.safetensors.index.json"):
        TensorFiles.of(tmp_path)


def test_an_index_that_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    save_indexed(tmp_path, tensors())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold `model-00002-of-00002.safetensors`, which its index names"):
        TensorFiles.of(tmp_path)


def test_an_index_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save(tmp_path, tensors())
    write_index(folder, {"weight_map": dict.fromkeys(tensors(), "../model.safetensors")})
    with pytest.raises(CheckpointError, match=r"must hold `../model.safetensors`"):
        TensorFiles.of(folder)


def test_an_index_that_is_wrong_about_a_file(tmp_path: Path) -> None:
    index = save_indexed(tmp_path, tensors())
    other = {"1": "2", "2": "1"}[index["model.norm.weight"][10]]
    wrong = f"model-0000{other}-of-00002.safetensors"
    write_index(tmp_path, {"weight_map": index | {"model.norm.weight": wrong}})
    with pytest.raises(CheckpointError, match=rf"must hold `model.norm.weight` in `{wrong}`, as its index says"):
        TensorFiles.of(tmp_path).check(SHAPE)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_of_another_form(tmp_path: Path, content: object) -> None:
    write_index(tmp_path, content)
    with pytest.raises(CheckpointError, match="must have an index with a `weight_map` of names to files"):
        TensorFiles.of(tmp_path)


DAMAGE = {"cut-short": -8, "cut-in-half": -3000, "almost-nothing": 4, "nothing": 0}


@pytest.mark.parametrize("size", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file(tmp_path: Path, size: int) -> None:
    save(tmp_path, tensors())
    file = tmp_path / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(CheckpointError, match=r"`model.path` must hold whole safetensors files") as caught:
        TensorFiles.of(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_pointer_that_git_lfs_left(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="must hold whole safetensors files"):
        TensorFiles.of(tmp_path)


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    script = f"""
import sys
from pathlib import Path
from nemo_qwen_hidden.checkpoint.tensors import TensorFiles
from nemo_qwen_hidden.plan.footprint import DecoderShape
TensorFiles.of(Path({str(tmp_path)!r})).check({SHAPE!r})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
