"""Layers of the decoder for machines without Transformer Engine, as Megatron layer specs.

S: tokens of a sequence, B: sequences, T: tokens of packed sequences laid end to end, N: heads of this rank,
G: key/value groups of this rank, D: size of a head.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm (https://arxiv.org/abs/1910.07467) with the constructor that Megatron's specs call.

    Megatron 0.16.1's own ``WrappedTorchNorm`` refuses sequence parallelism (``torch_norm.py:33``) and ignores
    ``params_dtype``. The mark on the weight makes Megatron sum its gradient over tp under sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SdpaCoreAttention(MegatronModule):
    """Causal attention through ``torch.nn.functional.scaled_dot_product_attention``, per document when packed.

    Megatron's unfused ``DotProductAttention`` needs an explicit S x S mask, is slower, and in bf16 loses accuracy in
    its softmax. Right padding needs no mask here: no token can see what comes after it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("context parallelism is not supported by this attention")
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] to [S, B, N*D]; packed: [T, N, D], [T, G, D] to [T, N*D].

        attention_mask: None for causal, or Megatron's [B, 1, S, S], True where a token must not be seen.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by this attention")
        if packed_seq_params is None:
            out = self._attend(query, key, value, attention_mask)
            return out.flatten(-2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        out = torch.empty_like(query)
        for start, stop in itertools.pairwise(bounds):
            rows = slice(start, stop)
            out[rows] = self._attend(query[rows, None], key[rows, None], value[rows, None], None)[:, 0]
        return out.flatten(-2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[S, B, heads, D] in, [S, B, N, D] out."""
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if mask is None else ~mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return out.permute(2, 0, 1, 3)


def decoder_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layers and final norm of this stage: Transformer Engine's where it can run, else Megatron's local layers with
    the norm and the attention of this file. In fp32 the latter always: Transformer Engine's linears would round to
    TF32, and its attention has no fp32 kernel for packed sequences.

    Only a GPU can run the first; ``tests/gpu/test_transformer_engine.py`` shows it.
    """
    if transformer_engine_runs() and config.params_dtype != torch.float32:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def transformer_engine_runs() -> bool:
    """Whether Transformer Engine is installed and there is a GPU for it."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    return bool(HAVE_TE) and torch.cuda.is_available()
