"""NeMo checkpoints put together without NeMo: torch's own writer, and the tensors that Megatron would have."""

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file

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
