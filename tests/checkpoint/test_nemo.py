"""NeMo checkpoints read as data: what is believed, what is refused, and that nothing is executed."""

import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file

from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.checkpoint.distributed import DistributedFiles
from nemo_qwen_hidden.checkpoint.fingerprint import final_norm_weight, weights_sha256
from nemo_qwen_hidden.checkpoint.nemo_tensors import NemoTensors
from nemo_qwen_hidden.checkpoint.opened import open_weights, tokenizer_folder
from nemo_qwen_hidden.checkpoint.to_huggingface import write_huggingface
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError, UserError
from tests.support.crafted_nemo import Evil, append_evil, craft, make_hostile, save_distributed, stacked
from tests.support.models import TINY, Tiny, ragged_batch, save_tiny


@pytest.fixture
def huggingface(tiny_folders: dict[Tiny, Path]) -> Path:
    return tiny_folders[TINY[0]]


@pytest.fixture
def nemo(huggingface: Path, tmp_path: Path) -> Path:
    return craft(huggingface, tmp_path / "nemo")


def fingerprint(folder: Path) -> str:
    return weights_sha256(open_weights(folder, read_architecture(folder)))


def test_architecture_and_fingerprint_are_those_of_the_huggingface_folder(nemo: Path, huggingface: Path) -> None:
    ours, theirs = read_architecture(nemo), read_architecture(huggingface)
    assert ours.shape == theirs.shape
    for field in ("tied", "rotary_base", "norm_epsilon", "max_positions", "sliding_window"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert fingerprint(nemo) == fingerprint(huggingface)
    norm = load_file(huggingface / "model.safetensors")["model.norm.weight"]
    assert (final_norm_weight(open_weights(nemo, ours)) == norm.numpy()).all()


@pytest.mark.parametrize("options", [{"apart": True}, {"prefix": "module.module."}, {"padding": 130}], ids=str)
def test_the_form_of_the_names_and_the_padding_do_not_matter(
    options: dict[str, object], huggingface: Path, tmp_path: Path
) -> None:
    assert fingerprint(craft(huggingface, tmp_path / "other", **options)) == fingerprint(huggingface)


def test_every_tensor_is_that_of_the_huggingface_folder(nemo: Path, huggingface: Path) -> None:
    weights = open_weights(nemo, read_architecture(nemo))
    assert isinstance(weights, NemoTensors)
    tensors = load_file(huggingface / "model.safetensors")
    assert {name if name == "lm_head.weight" else f"model.{name}" for name in weights.names} == set(tensors)
    for name in weights.names:
        expected = tensors[name if name == "lm_head.weight" else f"model.{name}"]
        assert torch.equal(weights.read(name), expected), name


def test_a_part_of_a_tensor_of_several_blocks(tmp_path: Path) -> None:
    folder = craft_blocks(tmp_path)
    stored = DistributedFiles.of(folder, "here")
    whole = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    assert torch.equal(stored.read("table"), whole)
    assert torch.equal(stored.read("table", slice(3, 8), slice(1, 5)), whole[3:8, 1:5])


def craft_blocks(tmp_path: Path) -> Path:
    """Blocks are what several ranks write; here two tensors become those of one."""
    whole = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    folder = tmp_path / "weights"
    save_distributed({"table": whole[:4].clone(), "rest": whole[4:].clone()}, folder)
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    table, rest = (metadata.state_dict_metadata.pop(name) for name in ("table", "rest"))
    metadata.state_dict_metadata["table"] = table
    table.size = torch.Size((10, 6))
    rest.chunks[0].offsets = torch.Size((4, 0))
    table.chunks.append(rest.chunks[0])
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == "rest":
            metadata.storage_data[type(index)("table", torch.Size((4, 0)))] = info
    file.write_bytes(pickle.dumps(metadata))
    return folder


def test_opening_needs_neither_torch_nor_nemo(nemo: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.checkpoint.opened import open_weights
folder = Path({str(nemo)!r})
open_weights(folder, read_architecture(folder))
assert not {{"torch", "nemo", "megatron"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_pickle_that_names_anything_else_is_refused_and_not_executed(nemo: Path, tmp_path: Path) -> None:
    (nemo / "weights" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match=r"it names posix\.system, which the format has no use for"):
        open_weights(nemo, read_architecture(nemo))
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_the_place_of_a_tensor_is_refused_and_not_executed(nemo: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((nemo / "weights" / ".metadata").read_bytes())
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = append_evil(nemo / "weights", tmp_path / "executed")
    (nemo / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=f"must hold a readable `{index.fqn}`"):
        weights_sha256(open_weights(nemo, read_architecture(nemo)))
    assert not (tmp_path / "executed").exists()


def test_what_only_torchs_reader_would_execute_is_not_executed(nemo: Path, tmp_path: Path) -> None:
    """Where torch's does not execute it any more, ``model/nemo_weights.py`` may leave the reading to Megatron."""
    before, executed = fingerprint(nemo), tmp_path / "executed"
    name = make_hostile(nemo, executed)
    assert fingerprint(nemo) == before
    (tmp_path / "back").mkdir()
    write_huggingface(nemo, tmp_path / "back")
    assert not executed.exists()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load({name: torch.empty(64)}, checkpoint_id=str(nemo / "weights"), no_dist=True)
    assert executed.exists()


def set_field(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "context" / "model.yaml"
        model = yaml.safe_load(file.read_text())
        for name, value in fields.items():
            (model if name in model else model["config"])[name] = value
        file.write_text(yaml.safe_dump(model))

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (file,) = folder.glob(f"weights/{name}")
        file.write_bytes(file.read_bytes()[:size])

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no context": (
        lambda folder: shutil.rmtree(folder / "context"),
        "must hold `context/model.yaml`, as NeMo 2 writes",
    ),
    "not yaml": (lambda f: (f / "context/model.yaml").write_text("{"), "must hold a readable `context/model.yaml` ("),
    "yaml that would build": (
        lambda f: (f / "context/model.yaml").write_text("!!python/object/apply:os.system ['false']"),
        "must hold a readable `context/model.yaml` (could not determine a constructor",
    ),
    "not an object": (lambda f: (f / "context/model.yaml").write_text("[]"), "must have an object in `context/model.y"),
    "no weights": (
        lambda folder: shutil.rmtree(folder / "weights"),
        "must hold a `weights/metadata.json` of Megatron's",
    ),
    "no metadata": (
        lambda f: (f / "weights/.metadata").unlink(),
        "must hold `weights/.metadata`, which is written last",
    ),
    "cut metadata": (cut(".metadata", 100), "must hold a `weights/.metadata` of torch's distributed format ("),
    "cut file": (cut("*.distcp", 5000), "in `weights/__0_0.distcp`, as its .metadata says"),
    "no file": (
        lambda folder: next(folder.glob("weights/*.distcp")).unlink(),
        "must hold `weights/__0_0.distcp`, which its .metadata names",
    ),
    "zarr": (
        lambda f: (f / "weights/metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "`model.path: weights/metadata.json: sharded_backend` must be 'torch_dist', but is 'zarr' instead",
    ),
    "Llama": (
        set_field(_target_="nemo.collections.llm.gpt.model.llama.LlamaModel"),
        "must be NeMo's Qwen2Model and its configuration (dense Qwen2 and Qwen2.5)",
    ),
    "Qwen3": (set_field(qk_layernorm=True), "config: qk_layernorm` must be False, as Qwen2 has it, but is True"),
    "no bias": (set_field(add_qkv_bias=False), "config: add_qkv_bias` must be True, as Qwen2 has it, but is False"),
    "experts": (set_field(num_moe_experts=8), "config: num_moe_experts` must be null, as Qwen2 has it, but is 8"),
    "scaled rope": (
        set_field(seq_len_interpolation_factor=2.0),
        "seq_len_interpolation_factor` must be null, as Qwen2",
    ),
    "scaled rope by name": (set_field(scale_factor=8.0), "config: scale_factor` must be absent: scaled rotary"),
    "window": (set_field(window_size=[128, 0]), "config: window_size` must be null, as Qwen2 has it"),
    "adapter": (set_field(model_transform={"_target_": "LoRA"}), "must be a whole model, not an adapter's checkpoint"),
    "no size": (set_field(num_layers=None), "config: num_layers` must be a whole number of at least 1, but is None"),
    "other size": (set_field(hidden_size=32), "must have shape [5, 32] by context/model.yaml, but is [5, 64]"),
    "more layers": (set_field(num_layers=6), "must have shape [6, 64] by context/model.yaml, but is [5, 64]"),
    "no number": (set_field(rotary_base="big"), "config: rotary_base` must be a number above 0, but is 'big'"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_opened_is_said_in_one_line_and_status_2(
    damage: Callable[[Path], None], says: str, nemo: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from nemo_qwen_hidden.cli.main import main

    damage(nemo)
    assert main(["plan", f"model.path={nemo}", "data.max_tokens=64"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert says in line


def test_a_foreign_tensor_and_a_missing_one(huggingface: Path, tmp_path: Path) -> None:
    tensors = stacked(huggingface)
    more = craft(huggingface, tmp_path / "more", tensors={**tensors, "decoder.layers.mlp.router.weight": torch.ones(2)})
    with pytest.raises(UnsupportedModelError, match=r"have no tensor `module\.decoder\.layers\.mlp\.router\.weight`"):
        open_weights(more, read_architecture(more))
    del tensors["decoder.layers.mlp.linear_fc2.weight"]
    less = craft(huggingface, tmp_path / "less", tensors=tensors)
    with pytest.raises(
        CheckpointError, match=r"must hold the tensor `module\.decoder\.layers\.mlp\.linear_fc2\.weight`"
    ):
        open_weights(less, read_architecture(less))


def test_damaged_bytes_are_noticed_when_they_are_read(nemo: Path) -> None:
    file = next(nemo.glob("weights/*.distcp"))
    file.write_bytes(b"\0" * file.stat().st_size)
    weights = open_weights(nemo, read_architecture(nemo))
    with pytest.raises(CheckpointError, match="must hold a readable"):
        weights_sha256(weights)


def test_the_tokenizer_is_the_contexts(nemo: Path) -> None:
    assert tokenizer_folder(nemo) == nemo / "context" / "nemo_tokenizer"
    set_field(tokenizer=None)(nemo)
    with pytest.raises(UserError, match=r"must name a tokenizer \(or `model\.tokenizer` a folder"):
        tokenizer_folder(nemo)
    set_field(tokenizer={"_target_": "nemo.SentencePieceTokenizer", "pretrained_model_name": "a"})(nemo)
    with pytest.raises(UserError, match="must be Hugging Face's AutoTokenizer"):
        tokenizer_folder(nemo)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_back_to_huggingface(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same names, bytes and logits; what NeMo's importer has untied is tied again."""
    from transformers import AutoModelForCausalLM

    source = save_tiny(tmp_path / "source", Tiny(layers=2, groups=2, tied=tied))
    file = source / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
    nemo, back = craft(source, tmp_path / "nemo"), tmp_path / "back"
    back.mkdir()
    write_huggingface(nemo, back, file_bytes=100_000)
    assert (back / "model.safetensors.index.json").is_file()
    expected = load_file(file)
    found = {name: value for part in back.glob("*.safetensors") for name, value in load_file(part).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in expected)
    one, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, back))
    ids = ragged_batch((9,)).input_ids
    with torch.no_grad():
        assert (one(ids).logits - other(ids).logits).abs().max() == 0.0
    assert one.state_dict().keys() == other.state_dict().keys()
