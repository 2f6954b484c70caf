"""What a model folder says of its architecture, and whether this package reproduces such a model exactly."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.checkpoint import nemo_context
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError
from nemo_qwen_hidden.plan.footprint import DecoderShape


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense Qwen2 decoder.

    tied: the output layer shares the embedding table. rotary_base: theta of the rotary embedding. norm_epsilon: added
    to the mean square in each RMSNorm. max_positions: tokens that the model was made for. sliding_window: tokens
    that each token can see, None for all before it. config: config.json as read, or what it
    would be for a NeMo checkpoint.
    """

    shape: DecoderShape
    tied: bool
    rotary_base: float
    norm_epsilon: float
    max_positions: int
    sliding_window: int | None
    config: Mapping[str, Any]

    def require_length(self, tokens: int, setting: str) -> None:
        """Checks that a sequence of ``tokens`` is run as the model was defined.

        Raises:
            UnsupportedModelError: a sliding window shorter than the sequence.
        """
        if self.sliding_window is not None and tokens > self.sliding_window:
            raise UnsupportedModelError(
                setting, f"must be at most the model's sliding window ({self.sliding_window} tokens)", tokens
            )


def read_architecture(folder: Path) -> Architecture:
    """Reads and checks ``config.json``, or the context of a NeMo checkpoint.

    Raises:
        CheckpointError: neither can be read, or a field is missing or of the wrong type.
        UnsupportedModelError: a model that would not be reproduced exactly; says which field is the reason.
    """
    return architecture_of(nemo_context.read_config(folder) if nemo_context.is_nemo(folder) else _config_json(folder))


def _config_json(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("model.path", "must be a model folder with a config.json", str(folder)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("model.path", f"must have a readable config.json ({error})", str(folder)) from None
    if not isinstance(config, dict):
        raise CheckpointError("model.path", "must have a config.json with an object in it", str(folder))
    return config


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Of what config.json holds.

    Raises:
        CheckpointError: a field is missing or of the wrong type.
        UnsupportedModelError: a model that would not be reproduced exactly; says which field is the reason.
    """
    _refuse_unsupported(config)
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    groups = _size(config, "num_key_value_heads", heads)
    if heads % groups:
        rule = f"must divide num_attention_heads ({heads})"
        raise CheckpointError("model.path: config.json: num_key_value_heads", rule, groups)
    shape = DecoderShape(
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_query_groups=groups,
        head_dim=_size(config, "head_dim", hidden // heads),
        ffn_hidden_size=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
    )
    return Architecture(
        shape=shape,
        tied=bool(config.get("tie_word_embeddings", False)),
        rotary_base=_positive(_rope(config), "rope_theta", config.get("rope_theta")),
        norm_epsilon=_positive(config, "rms_norm_eps"),
        max_positions=_size(config, "max_position_embeddings"),
        sliding_window=_sliding_window(config, shape.num_layers),
        config=config,
    )


def _size(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A field that holds a whole number of at least 1; ``default`` where it is absent or null."""
    value = default if config.get(field) is None else config[field]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"model.path: config.json: {field}", "must be a whole number of at least 1", value)
    return value


def _positive(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A field that holds a number above 0; ``default`` where it is absent or null."""
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"model.path: config.json: {field}", "must be a number above 0", value)
    return float(value)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transformers 5 keeps theta and the kind of scaling together in ``rope_parameters``."""
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field)
        if rope and not isinstance(rope, dict):
            raise CheckpointError(f"model.path: config.json: {field}", "must be an object or null", rope)
        if rope:
            return dict(rope)
    return {}


def _sliding_window(config: Mapping[str, Any], num_layers: int) -> int | None:
    """The window that some layer is run with, None where every layer sees everything before it.

    Defaults are those of transformers' ``Qwen2Config``.
    """
    if not config.get("use_sliding_window") or config.get("sliding_window", 0) is None:
        return None
    layer_types = config.get("layer_types")
    if layer_types is not None:
        slides = "sliding_attention" in layer_types
    else:
        slides = int(config.get("max_window_layers", 28)) < num_layers
    return _size(config, "sliding_window", 4096) if slides else None


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    rope = _rope(config)
    rope_kind = rope.get("rope_type") or rope.get("type") or "default"
    refusals = (
        (config.get("model_type") != "qwen2", "model_type", "must be 'qwen2' (dense Qwen2 and Qwen2.5)"),
        (rope_kind != "default", "rope_scaling", "must be absent: scaled rotary embeddings are not reproduced"),
        (
            config.get("quantization_config") is not None,
            "quantization_config",
            "must be absent: quantised weights are not read",
        ),
        (config.get("hidden_act", "silu") != "silu", "hidden_act", "must be 'silu'"),
        (config.get("is_causal", True) is not True, "is_causal", "must be true: only causal attention is reproduced"),
    )
    for refused, field, rule in refusals:
        if refused:
            value = rope if field == "rope_scaling" else config.get(field)
            raise UnsupportedModelError(f"model.path: config.json: {field}", rule, value)
