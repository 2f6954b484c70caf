"""``config.json`` as a decoder's shape, and by what name each unsupported model is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError, UserError
from nemo_qwen_hidden.plan.footprint import DecoderShape

# Qwen/Qwen2.5-0.5B
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
ABSENT = object()


def read(folder: Path, **changes: object) -> Architecture:
    """The architecture of ``CONFIG`` with some fields changed, or taken away."""
    config = {field: value for field, value in {**CONFIG, **changes}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def refusal(folder: Path, **changes: object) -> UserError:
    with pytest.raises(UserError) as caught:
        read(folder, **changes)
    return caught.value


def test_a_published_config(tmp_path: Path) -> None:
    assert read(tmp_path) == Architecture(
        shape=DecoderShape(
            num_layers=24,
            hidden_size=896,
            num_heads=14,
            num_query_groups=2,
            head_dim=64,
            ffn_hidden_size=4864,
            vocab_size=151936,
        ),
        tied=True,
        rotary_base=1e6,
        norm_epsilon=1e-6,
        max_positions=32768,
        sliding_window=None,
        config=CONFIG,
    )


def test_the_embedded_model() -> None:
    assert read_architecture(demo.model_folder()).shape.num_layers == 6


def test_what_may_be_left_out(tmp_path: Path) -> None:
    left_out = {"num_key_value_heads": None, "tie_word_embeddings": ABSENT, "hidden_act": ABSENT}
    architecture = read(tmp_path, **left_out)
    assert (architecture.shape.num_query_groups, architecture.tied) == (14, False)
    assert read(tmp_path, head_dim=128).shape.head_dim == 128


def test_theta_as_transformers_5_saves_it(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert read(tmp_path, rope_parameters=rope, rope_theta=ABSENT).rotary_base == 5e5


WINDOWS: dict[str, tuple[dict[str, Any], int | None]] = {
    "off": ({"use_sliding_window": False, "sliding_window": 64}, None),
    "on": ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20}, 64),
    "null": ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 20}, None),
    "in-no-layer": ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 24}, None),
    "by-layer-types": ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"]}, 64),
    "layer-types-full": ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"]}, None),
    # Qwen2Config's own defaults: 4096 tokens, from layer 28 on
    "default-size": ({"use_sliding_window": True, "sliding_window": ABSENT, "max_window_layers": 0}, 4096),
    "default-layers": ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": ABSENT}, None),
}


@pytest.mark.parametrize(("changes", "window"), WINDOWS.values(), ids=WINDOWS)
def test_sliding_windows(tmp_path: Path, changes: dict[str, Any], window: int | None) -> None:
    architecture = read(tmp_path, **changes)
    assert architecture.sliding_window == window
    architecture.require_length(64, "data.max_tokens")
    if window is not None:
        with pytest.raises(
            UnsupportedModelError, match=r"`data.max_tokens` must be at most the model's sliding window"
        ):
            architecture.require_length(window + 1, "data.max_tokens")


UNSUPPORTED: dict[str, tuple[dict[str, Any], str, object]] = {
    "llama": ({"model_type": "llama"}, "model_type", "llama"),
    "moe": ({"model_type": "qwen2_moe"}, "model_type", "qwen2_moe"),
    "no-type": ({"model_type": ABSENT}, "model_type", None),
    "yarn": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling", {"type": "yarn"}),
    "yarn-5": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling", {"rope_type": "yarn"}),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config", {"bits": 4}),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
    "bidirectional": ({"is_causal": False}, "is_causal", False),
}


@pytest.mark.parametrize(("changes", "field", "value"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_models(tmp_path: Path, changes: dict[str, Any], field: str, value: object) -> None:
    problem = refusal(tmp_path, **changes)
    assert isinstance(problem, UnsupportedModelError)
    assert (problem.setting, problem.value) == (f"model.path: config.json: {field}", value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "absent": ({"hidden_size": ABSENT}, "hidden_size` must be a whole number of at least 1, but is None instead"),
    "null": ({"vocab_size": None}, "vocab_size` must be a whole number of at least 1, but is None instead"),
    "text": ({"num_hidden_layers": "24"}, "num_hidden_layers` must be a whole number of at least 1, but is '24'"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads` must be a whole number of at least 1, but is 0"),
    "groups": ({"num_key_value_heads": 4}, r"num_key_value_heads` must divide num_attention_heads \(14\), but is 4"),
    "epsilon": ({"rms_norm_eps": ABSENT}, "rms_norm_eps` must be a number above 0, but is None"),
    "theta": ({"rope_theta": "big"}, "rope_theta` must be a number above 0, but is 'big'"),
    "no-theta": ({"rope_theta": ABSENT}, "rope_theta` must be a number above 0, but is None"),
    "true": ({"rope_theta": True}, "rope_theta` must be a number above 0, but is True"),
    "rope": ({"rope_scaling": "yarn"}, "rope_scaling` must be an object or null, but is 'yarn'"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_fields_that_are_wrong(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path, **changes)


FILES = {
    "not-json": (b"{", r"must have a readable config.json"),
    "not-utf-8": (b'{"a": "\xff"}', r"must have a readable config.json"),
    "a-list": (b"[]", r"must have a config.json with an object in it"),
}


@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_architecture(tmp_path)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`model.path` must be a model folder with a config.json, but is "):
        read_architecture(tmp_path)
