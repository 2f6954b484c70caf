"""Bytes by hand for Qwen2.5-0.5B; ``tests/distributed/test_weights.py`` compares them with built models."""

from nemo_qwen_hidden.plan.footprint import DecoderShape, padded_vocab, weight_bytes

HALF_B = DecoderShape(
    num_layers=24,
    hidden_size=896,
    num_heads=14,
    num_query_groups=2,
    head_dim=64,
    ffn_hidden_size=4864,
    vocab_size=151936,
)


def test_the_whole_decoder_is_what_qwen_reports() -> None:
    """494,032,768 parameters with tied embeddings (Qwen2.5 technical report: 0.49 B)."""
    total = weight_bytes(HALF_B, layers=24, tp=1, first=True, final_norm=True, itemsize=2)
    assert total == 494_032_768 * 2


def test_a_later_stage_has_no_vocabulary() -> None:
    assert weight_bytes(HALF_B, layers=0, tp=2, first=False, final_norm=True, itemsize=4) == 896 * 4


def test_vocabulary_is_padded_to_tp() -> None:
    assert padded_vocab(HALF_B, 3) == 151938
