"""The modules of Megatron's local layers, each a subclass of its own, with arithmetic that is fast on a CPU.

It is used without gradients; with them, in training mode, on a GPU, and where somebody replaced a submodule, Megatron's
own is. In training mode, since recomputed layers run without gradients first: both passes have to have the same bits.
What a state is does not depend on who looks: with hooks or without, the same products are computed of the same blocks.

C: tokens of this rank, B: sequences, T: C x B (packed: C), H: hidden, F: inner units of this rank, N: heads of this
rank, D: size of a head.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_qwen_hidden.model.products import blocks, multiply, multiply_into, swiglu, working_dtype
from nemo_qwen_hidden.plan.slices import zigzag


class LocalNorm(nn.RMSNorm):
    """RMSNorm (https://arxiv.org/abs/1910.07467) with the constructor that Megatron's specs call.

    Megatron 0.16.1's own ``WrappedTorchNorm`` refuses sequence parallelism (``torch_norm.py:33``) and ignores
    ``params_dtype``. The mark on the weight makes Megatron sum its gradient over tp under sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, state: Tensor) -> Tensor:
        """[..., H] to [..., H]; half precision is widened within, and rounded once."""
        if not _computes_here(self, state):
            normed: Tensor = super().forward(state)
            return normed
        state_TH, weight_H = state.reshape(-1, state.shape[-1]), self.weight.float()
        out_TH = torch.empty_like(state_TH)
        for rows in blocks(len(state_TH)):
            block = state_TH[rows].float()
            mean_square = torch.linalg.vector_norm(block, dim=-1, keepdim=True).square_().div_(len(weight_H))
            torch.mul(block * mean_square.add_(self.eps).rsqrt_(), weight_H, out=out_TH[rows])
        return out_TH.view(state.shape)


class LocalColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear, whose product is ``multiply``."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _computes_here(self, input):
            given: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return given
        if self.sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        return multiply(input.flatten(0, -2), weight, kwargs["bias"]).view(*input.shape[:-1], -1)


class LocalRowLinear(RowParallelLinear):
    """Megatron's row-parallel linear, whose product is ``multiply``."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _computes_here(self, input):
            given: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return given
        return multiply(input.flatten(0, -2), weight, kwargs["bias"]).view(*input.shape[:-1], -1)


class LocalMLP(MLP):
    """Megatron's MLP, gated by silu, a block of rows at a time from its input to its output.

    A spec names the class alone: of specs with submodules Megatron 0.16.1 takes only its own classes for an MLP
    (``transformer_layer.py:354``), and says so of others on the terminal.
    """

    def __init__(self, config: TransformerConfig) -> None:
        linears = MLPSubmodules(linear_fc1=LocalColumnLinear, linear_fc2=LocalRowLinear)
        tp = parallel_state.get_tensor_model_parallel_group()
        super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[C, B, H] (under sequence parallelism C / tp) to the same, and no bias."""
        first, second = self.linear_fc1, self.linear_fc2
        own = type(first) is LocalColumnLinear and type(second) is LocalRowLinear
        if not own or not _computes_here(self, hidden_states) or _has_hooks(first):
            given: tuple[Tensor, None] = super().forward(hidden_states, *args, **kwargs)
            return given
        if first.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=first.tp_group)
        size, hidden_TH = hidden_states.shape, hidden_states.flatten(0, -2)
        if _has_hooks(second):
            whole_FT = hidden_TH.new_empty(second.weight.shape[1], len(hidden_TH))
            for rows, act_RF in swiglu(hidden_TH, first.weight):
                whole_FT[:, rows] = act_RF.t()
            whole: tuple[Tensor, None] = second(whole_FT.t().view(*size[:-1], -1))
            return whole
        out_TH = torch.empty_like(hidden_TH)
        weight = second.weight.to(working_dtype(out_TH.dtype))
        for rows, act_RF in swiglu(hidden_TH, first.weight):
            multiply_into(out_TH[rows], act_RF.to(weight.dtype), weight)
        out = out_TH.view(size)
        if second.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(out, group=second.tp_group), None
        return reduce_from_tensor_model_parallel_region(out, group=second.tp_group), None


class LocalSelfAttention(SelfAttention):
    """Megatron's self-attention, which turns queries and keys by their positions in half as many passes."""

    _angles: Tensor | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As Megatron's."""
        rotary = kwargs.get("rotary_pos_emb")
        if (
            _computes_here(self, hidden_states)
            and isinstance(rotary, Tensor)
            and kwargs.get("inference_context") is None
        ):
            kwargs["rotary_pos_emb"] = None
            self._angles = self._angles_of_tokens(rotary, kwargs.get("packed_seq_params"))
        try:
            given: tuple[Tensor, Tensor] = super().forward(hidden_states, attention_mask, **kwargs)
            return given
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Queries [C, B, N, D], keys and values [C, B, G, D]; the first two turned already."""
        given = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is None:
            return given
        query, key, value = given
        cos, sin = self._angles.cos(), self._angles.sin()
        return _turned(query, cos, sin), _turned(key, cos, sin), value

    def _angles_of_tokens(self, rotary: Tensor, packed: PackedSeqParams | None) -> Tensor:
        """fp32 [C, 1, 1, D / 2] out of Megatron's [positions, 1, 1, D], whose halves are the same."""
        angles = rotary[..., : rotary.shape[-1] // 2].float()
        return angles if packed is None else angles[self._positions(packed.cu_seqlens_q.tolist())]

    def _positions(self, bounds: Sequence[int]) -> Tensor:
        """int64 [C]: of this rank's tokens in their documents."""
        cp = self.pg_collection.cp
        spans: list[range] = []
        for start, stop in itertools.pairwise(bounds):
            document = range(stop - start)
            spans += (document,) if cp.size() == 1 else zigzag(document, cp.rank(), cp.size())
        return torch.cat([torch.arange(span.start, span.stop) for span in spans])


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) of [C, B, heads, D] by halves, as Qwen2 pairs dimensions, at
    the angles [C, 1, 1, D / 2] whose cosines and sines are given."""
    wide = heads.float()
    half = wide.shape[-1] // 2
    out = torch.empty(wide.shape)
    first, second = wide[..., :half], wide[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out.to(heads.dtype)


def _computes_here(module: nn.Module, state: Tensor) -> bool:
    here = state.device.type == "cpu" and not torch.is_grad_enabled() and not module.training
    return here and not torch.is_autocast_enabled("cpu")


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)
