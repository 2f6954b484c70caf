"""The shape of one token's state at each site. Heads and inner units stand in Hugging Face's order."""

from collections.abc import Sequence
from math import prod

from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, MLP_ACT, ROT_K, ROT_Q, HookPoint, K, Q, V, Z
from nemo_qwen_hidden.plan.footprint import DecoderShape


def state_shape(
    point: HookPoint, decoder: DecoderShape, *, keys: int, heads: Sequence[int] | None = None
) -> tuple[int, ...]:
    """[heads, head_dim] of queries and of what attention gives, [groups, head_dim] of keys and values,
    [asked heads, keys] of attention weights, [ffn_hidden_size] of the MLP's inner units, else [hidden_size].

    Args:
        keys: the most tokens that are run together, which bounds what a token can attend to.
        heads: attention heads whose weights are asked for; None is all.
    """
    if point.site in (Q, ROT_Q, Z):
        return decoder.num_heads, decoder.head_dim
    if point.site in (K, ROT_K, V):
        return decoder.num_query_groups, decoder.head_dim
    if point.site == ATTN_WEIGHTS:
        return decoder.num_heads if heads is None else len(heads), keys
    if point.site == MLP_ACT:
        return (decoder.ffn_hidden_size,)
    return (decoder.hidden_size,)


def state_width(point: HookPoint, decoder: DecoderShape, *, keys: int, heads: Sequence[int] | None = None) -> int:
    """Numbers in one token's state."""
    return prod(state_shape(point, decoder, keys=keys, heads=heads))
