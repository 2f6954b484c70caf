"""What the ``context/`` of a NeMo 2 checkpoint says, read as data: NeMo is not imported, and nothing is built from it.

NeMo 2.7.3 writes ``context/model.yaml`` (``nemo/lightning/io/mixin.py: io_dump``): the model's class and every field of
its configuration, defaults included, by name. ``io.json`` has the same without the defaults, and is not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.checkpoint.distributed import WEIGHTS
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError

CONTEXT, MODEL = "context", "model.yaml"
_FAMILIES = ("nemo.collections.llm.gpt.model.qwen2.", "nemo_qwen_hidden.")
_SIZES = {  # of NeMo: of Hugging Face
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
}
_DERIVED = ("num_query_groups", "kv_channels")  # null: from the others
_NUMBERS = {"layernorm_epsilon": "rms_norm_eps", "rotary_base": "rope_theta"}
_DEFINES_QWEN2: Mapping[str, object] = {
    "normalization": "RMSNorm",
    "activation_func": "torch.nn.functional.silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "position_embedding_type": "rope",
}
_MUST_NOT_DIFFER: Mapping[str, object] = {  # where it is said at all
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "mrope_section": None,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
    "attention_output_gate": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "heterogeneous_block_specs": False,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "fp8_param": False,
    "fp4_param": False,
}
_DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}


def is_nemo(folder: Path) -> bool:
    """Whether a folder is a NeMo 2 checkpoint and not one of Hugging Face's."""
    return not (folder / "config.json").is_file() and ((folder / CONTEXT).is_dir() or (folder / WEIGHTS).is_dir())


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a NeMo checkpoint as Hugging Face's config.json would have it.

    Raises:
        CheckpointError: no readable context, or a field missing or of the wrong type.
        UnsupportedModelError: not a Qwen2, or one that would not be reproduced exactly; says which field is the reason.
    """
    setting = "model.path"
    model = read_context(folder, setting)
    if model.get("model_transform") is not None:
        rule = "must be a whole model, not an adapter's checkpoint (that is `model.adapter`, its base is `model.path`)"
        raise CheckpointError(setting, rule, str(folder))
    config = model.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{_place(setting)}: config", "must be there", config)
    for part, record in (("", model), ("config: ", config)):
        target = record.get("_target_")
        if not str(target).startswith(_FAMILIES):
            rule = "must be NeMo's Qwen2Model and its configuration (dense Qwen2 and Qwen2.5)"
            raise UnsupportedModelError(f"{_place(setting)}: {part}_target_", rule, target)
    _refuse_unsupported(config)
    found: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "tie_word_embeddings": config.get("share_embeddings_and_output_weights") is True,
        "use_sliding_window": False,
    }
    found |= {theirs: _size(config, ours) for ours, theirs in _SIZES.items() if not _left_out(config, ours)}
    found |= {theirs: _positive(config, ours) for ours, theirs in _NUMBERS.items()}
    dtype = _DTYPES.get(str(_plain(config.get("params_dtype"))))
    return found if dtype is None else {**found, "torch_dtype": dtype}


def tokenizer_place(folder: Path) -> str | Path:
    """Where the tokenizer of a NeMo checkpoint is: a folder in its context, or else the name that NeMo was given.

    Raises:
        CheckpointError: none is named. UnsupportedModelError: one that is not Hugging Face's.
    """
    tokenizer = read_context(folder, "model.path").get("tokenizer")
    if not isinstance(tokenizer, dict):
        rule = "must name a tokenizer (or `model.tokenizer` a folder with one; data with `token_ids` needs none)"
        raise CheckpointError(f"{_place('model.path')}: tokenizer", rule, tokenizer)
    target, name = str(tokenizer.get("_target_")), tokenizer.get("pretrained_model_name")
    if not target.endswith(".AutoTokenizer") or not isinstance(name, str):
        rule = "must be Hugging Face's AutoTokenizer (or `model.tokenizer` name a folder with one)"
        raise UnsupportedModelError(f"{_place('model.path')}: tokenizer", rule, target)
    inside = folder / CONTEXT / name
    return inside if inside.is_dir() else name


def read_context(folder: Path, setting: str) -> dict[str, Any]:
    """``context/model.yaml`` of a NeMo checkpoint, as plain values. setting: what named the folder, for errors.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    import yaml

    file = folder / CONTEXT / MODEL
    try:
        model = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        rule = f"must hold `{CONTEXT}/{MODEL}`, as NeMo 2 writes it"
        raise CheckpointError(setting, rule, str(folder)) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(setting, f"must hold a readable `{CONTEXT}/{MODEL}` ({reason})", str(folder)) from None
    if not isinstance(model, dict):
        raise CheckpointError(setting, f"must have an object in `{CONTEXT}/{MODEL}`", str(folder))
    return model


def _place(setting: str) -> str:
    return f"{setting}: {CONTEXT}/{MODEL}"


def _plain(value: object) -> object:
    """A function or dtype, which stands there as an object with ``_target_``, by its name."""
    return value.get("_target_") if isinstance(value, dict) else value


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for field, wanted in _DEFINES_QWEN2.items():
        _require(config, field, wanted)
    for field, wanted in _MUST_NOT_DIFFER.items():
        if field in config:
            _require(config, field, wanted)
    scaling = next((field for field in config if "rope_scaling" in field or field == "scale_factor"), None)
    if scaling is not None and config[scaling]:
        rule = "must be absent: scaled rotary embeddings are not reproduced"
        raise UnsupportedModelError(f"{_place('model.path')}: config: {scaling}", rule, config[scaling])


def _require(config: Mapping[str, Any], field: str, wanted: object) -> None:
    found = _plain(config.get(field))
    if found != wanted or isinstance(found, bool) is not isinstance(wanted, bool):
        rule = "must be null" if wanted is None else f"must be {wanted!r}"
        raise UnsupportedModelError(f"{_place('model.path')}: config: {field}", f"{rule}, as Qwen2 has it", found)


def _left_out(config: Mapping[str, Any], field: str) -> bool:
    return field in _DERIVED and config.get(field) is None


def _size(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{_place('model.path')}: config: {field}", "must be a whole number of at least 1", value)
    return value


def _positive(config: Mapping[str, Any], field: str) -> float:
    value = config.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"{_place('model.path')}: config: {field}", "must be a number above 0", value)
    return float(value)
