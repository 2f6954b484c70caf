"""Layers of the decoder for machines without Transformer Engine, as Megatron layer specs.

S: tokens of a sequence, C: those of them that a context-parallel rank has, B: sequences, T: the same of packed
sequences laid end to end, N: heads of this rank, G: key/value groups of this rank, D: size of a head.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_qwen_hidden.capture.exchange import gather_tokens
from nemo_qwen_hidden.model.local_layers import (
    LocalColumnLinear,
    LocalMLP,
    LocalNorm,
    LocalRowLinear,
    LocalSelfAttention,
)
from nemo_qwen_hidden.plan.slices import zigzag


class SdpaCoreAttention(MegatronModule):
    """Causal attention through ``torch.nn.functional.scaled_dot_product_attention``, per document when packed.

    Megatron's unfused ``DotProductAttention`` needs an explicit S x S mask, is slower, in bf16 loses accuracy in its
    softmax, and refuses context parallelism. Right padding needs no mask here: no token can see what comes after it.

    Under context parallelism each rank gathers all keys and values, puts them into the order of the sequence, and
    attends with its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.cp_group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp
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
        """query [C, B, N, D], key and value [C, B, G, D] to [C, B, N*D]; packed: [T, N, D], [T, G, D] to [T, N*D].

        attention_mask: None for causal, or Megatron's [B, 1, C, S], True where a token must not be seen; its rows are
        those of this rank's queries.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by this attention")
        bounds = [0, len(query) * self.cp_group.size()]
        if packed_seq_params is not None:
            query, key, value = query[:, None], key[:, None], value[:, None]
            bounds = packed_seq_params.cu_seqlens_q.tolist()
        if self.cp_group.size() > 1:
            spans = list(_spans(bounds, self.cp_group.size()))
            key, value = (gather_tokens(each, spans, self.cp_group) for each in (key, value))
        if attention_mask is not None:
            return self._attend(query, key, value, ~attention_mask).flatten(-2)
        out, index = torch.empty_like(query), 0
        for start, stop in itertools.pairwise(bounds):
            for tokens in _own(range(start, stop), self.cp_group):
                rows = slice(index, index + len(tokens))
                seen = slice(start, tokens.stop)
                mask = None if tokens.start == start else _causal(len(tokens), tokens.stop - start, query.device)
                out[rows] = self._attend(query[rows], key[seen], value[seen], mask)
                index += len(tokens)
        out = out.flatten(-2)
        return out if packed_seq_params is None else out[:, 0]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        """[queries, B, N, D] and [keys, B, G, D] to [queries, B, N, D]; ``seen`` is True where a query sees a key,
        None: the first query sees the first key, and so on."""
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=seen,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=seen is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return out.permute(2, 0, 1, 3)


def _own(block: range, cp: dist.ProcessGroup) -> Iterable[range]:
    """The tokens of a block that this context-parallel rank has."""
    return (block,) if cp.size() == 1 else zigzag(block, cp.rank(), cp.size())


def _spans(bounds: Sequence[int], ranks: int) -> Iterable[range]:
    """The tokens of all blocks that the first context-parallel rank has, in its order, then those of the next."""
    for rank in range(ranks):
        for start, stop in itertools.pairwise(bounds):
            yield from zigzag(range(start, stop), rank, ranks)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """The last query sees every key, the one before all but one, and so on."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def decoder_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layers and final norm of this stage: Transformer Engine's where it can run, else Megatron's local layers with
    modules of our own. In fp32 the latter always: Transformer Engine's linears would round to
    TF32, and its attention has no fp32 kernel for packed sequences.

    Only a GPU can run the first; ``tests/gpu/test_transformer_engine.py`` shows it.
    """
    if transformer_engine_runs() and config.params_dtype != torch.float32:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer, norm = local_layer(), LocalNorm
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def local_layer() -> ModuleSpec:
    """Megatron's local layer with the modules of ``local_layers`` and the attention of this file."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = LocalNorm
    layer.mlp, attention = LocalMLP, layer.self_attention
    attention.module = LocalSelfAttention
    attention.submodules.core_attention = SdpaCoreAttention
    attention.submodules.linear_qkv, attention.submodules.linear_proj = LocalColumnLinear, LocalRowLinear
    return spec


def transformer_engine_runs() -> bool:
    """Whether Transformer Engine is installed and there is a GPU for it."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    return bool(HAVE_TE) and torch.cuda.is_available()
