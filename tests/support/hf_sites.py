"""Every site of every layer by hooks on transformers' own modules."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_qwen_hidden.hookpoint import (
    ATTN_OUT,
    ATTN_WEIGHTS,
    EMBED,
    FINAL_NORM,
    MLP_ACT,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    ROT_K,
    ROT_Q,
    SITES,
    HookPoint,
    K,
    Q,
    V,
    Z,
)
from tests.support.models import Batch

Keep = Callable[[str, torch.Tensor], None]


def transformers_sites(
    folder: Path, batch: Batch, dtype: torch.dtype = torch.float32, *, sites: Sequence[str] = SITES
) -> list[dict[HookPoint, torch.Tensor]]:
    """For each document alone (no padding), the state at ``sites`` of all layers, as transformers' Qwen2 has it.

    Values are [tokens, width], heads side by side in Hugging Face's order; ``attn_weights`` are
    [tokens, heads, keys], the document's tokens being the keys.
    """
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    found: dict[HookPoint, torch.Tensor] = {}

    def keeper(layer: int | None) -> Keep:
        return lambda site, state: found.update({HookPoint(site, layer): state.squeeze(0).clone()})

    keep = keeper(None)
    model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, output: keep(EMBED, output))
    model.model.norm.register_forward_hook(lambda _module, _inputs, output: keep(FINAL_NORM, output))
    for index, layer in enumerate(model.model.layers):
        _watch(layer, keeper(index))

    documents = []
    for row, length in enumerate(batch.lengths):
        with torch.no_grad():
            model.model(batch.input_ids[row : row + 1, :length], use_cache=False)
        documents.append({point: state for point, state in found.items() if point.site in sites})
        found.clear()
    return documents


def _watch(layer: Any, keep: Keep) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for site, projection in ((Q, attention.q_proj), (K, attention.k_proj), (V, attention.v_proj)):
        projection.register_forward_hook(lambda _module, _inputs, output, site=site: keep(site, output))
    for site, projection in ((Z, attention.o_proj), (MLP_ACT, mlp.down_proj)):
        projection.register_forward_pre_hook(lambda _module, inputs, site=site: keep(site, inputs[0]))
    attention.register_forward_hook(_attention_hook(keep), with_kwargs=True)
    mlp.register_forward_hook(lambda _module, _inputs, output: keep(MLP_OUT, output))
    layer.register_forward_pre_hook(lambda _module, inputs: keep(RESID_PRE, inputs[0]))
    # the norm before the MLP is the first to see the sum of residual stream and attention
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _module, inputs: keep(RESID_MID, inputs[0]))
    layer.register_forward_hook(
        lambda _module, _inputs, output: keep(RESID_POST, output[0] if isinstance(output, tuple) else output)
    )


def _attention_hook(keep: Keep) -> Callable[..., None]:
    """Rotated queries and keys pass through no module: transformers' own function makes them from the projections."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    def hook(attention: Any, _inputs: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        hidden = kwargs["hidden_states"]
        heads_of = (*hidden.shape[:-1], -1, attention.head_dim)
        # forward, not a call: the hooks of the projections have kept these already
        q, k = (each.forward(hidden).view(heads_of).transpose(1, 2) for each in (attention.q_proj, attention.k_proj))
        for site, rotated in zip(
            (ROT_Q, ROT_K), apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"]), strict=True
        ):
            keep(site, rotated.transpose(1, 2).flatten(2))
        keep(ATTN_OUT, output[0])
        keep(ATTN_WEIGHTS, output[1].transpose(1, 2))

    return hook
