"""The sizes of Qwen2.5 that are published, for plans without a model folder."""

from nemo_qwen_hidden.checkpoint.architecture import Architecture, architecture_of
from nemo_qwen_hidden.errors import ConfigError

# config.json of Qwen/Qwen2.5-*-Instruct: num_hidden_layers, hidden_size, num_attention_heads, num_key_value_heads,
# intermediate_size, vocab_size, tie_word_embeddings
_SIZES = {
    "0.5B": (24, 896, 14, 2, 4864, 151936, True),
    "1.5B": (28, 1536, 12, 2, 8960, 151936, True),
    "3B": (36, 2048, 16, 2, 11008, 151936, True),
    "7B": (28, 3584, 28, 4, 18944, 152064, False),
    "14B": (48, 5120, 40, 8, 13824, 152064, False),
    "32B": (64, 5120, 40, 8, 27648, 152064, False),
    "72B": (80, 8192, 64, 8, 29568, 152064, False),
}
NAMES = tuple(_SIZES)


def published(name: str) -> Architecture:
    """Qwen2.5 of one of ``NAMES``, such as ``7B``.

    Raises:
        ConfigError: no such size.
    """
    if name not in _SIZES:
        raise ConfigError("--shape", f"must be a size of Qwen2.5: {', '.join(NAMES)}", name)
    layers, hidden, heads, groups, inner, vocabulary, tied = _SIZES[name]
    return architecture_of(
        {
            "model_type": "qwen2",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
        }
    )
