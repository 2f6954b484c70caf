"""Megatron's fused query, key and value: by query group ``[q of group g, k_g, v_g]``, rows of weights and biases."""

from typing import TYPE_CHECKING

from nemo_qwen_hidden.plan.footprint import DecoderShape

if TYPE_CHECKING:
    import torch


def projection(qkv: "torch.Tensor", shape: DecoderShape, which: str) -> "torch.Tensor":
    """The rows of ``q``, ``k`` or ``v``, in Hugging Face's order, of [(heads + 2 * groups) * head_dim, ...]."""
    by_group = qkv.unflatten(0, (shape.num_query_groups, -1))
    sizes = [heads * shape.head_dim for heads in (shape.num_heads // shape.num_query_groups, 1, 1)]
    rows: torch.Tensor = by_group.split(sizes, dim=1)["qkv".index(which)].flatten(0, 1)
    return rows
