"""What ``config.json`` says, and whether this package reproduces such a model exactly."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError
from nemo_qwen_hidden.plan.footprint import DecoderShape


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense Qwen2 decoder.

    tied: the output layer shares the embedding table. rotary_base: theta of the rotary embedding. norm_epsilon: added
    to the mean square in each RMSNorm. max_positions: tokens that the model was made for. sliding_window: tokens
    that each token can see, None for all before it. config: config.json as read.
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
    """Reads and checks ``config.json``.

    Raises:
        CheckpointError: no readable config.json, or a field missing or of the wrong type.
        UnsupportedModelError: a model that would not be reproduced exactly; says which field is the reason.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("model.path", "must be a model folder with a config.json", str(folder)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("model.path", f"must have a readable config.json ({error})", str(folder)) from None
    if not isinstance(config, dict):
        raise CheckpointError("model.path", "must have a config.json with an object in it", str(folder))
    _refuse_unsupported(config)
    try:
        return _architecture(config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "model.path", f"must have a complete Qwen2 config.json (field {error})", str(folder)
        ) from None


def _architecture(config: Mapping[str, Any]) -> Architecture:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    shape = DecoderShape(
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        num_heads=heads,
        num_query_groups=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        ffn_hidden_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
    )
    return Architecture(
        shape=shape,
        tied=bool(config.get("tie_word_embeddings", False)),
        rotary_base=float(_rope(config).get("rope_theta") or config["rope_theta"]),
        norm_epsilon=float(config["rms_norm_eps"]),
        max_positions=int(config["max_position_embeddings"]),
        sliding_window=_sliding_window(config, shape.num_layers),
        config=config,
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transformers 5 keeps theta and the kind of scaling together in ``rope_parameters``."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _sliding_window(config: Mapping[str, Any], num_layers: int) -> int | None:
    """The window that some layer is run with, None where every layer sees everything before it."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return None
    layer_types = config.get("layer_types")
    if layer_types is not None:
        slides = "sliding_attention" in layer_types
    else:
        slides = int(config.get("max_window_layers", 0)) < num_layers
    return int(config["sliding_window"]) if slides else None


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
            raise UnsupportedModelError(
                f"model.path: config.json: {field}", rule, config.get(field, config.get("rope_parameters"))
            )
