"""From the tensors of a checkpoint to the parameters of one rank, slice by slice.

Only this rank's part of each tensor is read, in the file's dtype, and copied into a parameter that exists already:
the peak is the rank's own weights plus its part of one tensor. Megatron keeps query, key and value of a query group
together (``[q of group g, k_g, v_g]``) and gate before up in ``linear_fc1``.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from nemo_qwen_hidden.checkpoint.tensors import EMBEDDING, FINAL_NORM, OUTPUT, Reader
from nemo_qwen_hidden.errors import HiddenStatesError
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.topology import Place

Fill = Callable[[Tensor], None]


def load_weights(model: MCoreGPTModel, reader: Reader, shape: DecoderShape, place: Place) -> None:
    """Fills every parameter of this rank's stage.

    Raises:
        HiddenStatesError: a parameter that no tensor was assigned to, which would leave it random.
    """
    parameters = dict(model.named_parameters())
    unassigned = set(parameters)
    with torch.no_grad():
        for name, fill in assignments(model, reader, shape, place):
            if name in unassigned:
                fill(parameters[name])
                unassigned.remove(name)
    if unassigned:
        raise HiddenStatesError(f"no tensor of the checkpoint was assigned to {sorted(unassigned)}")


def assignments(model: MCoreGPTModel, reader: Reader, shape: DecoderShape, place: Place) -> Iterator[tuple[str, Fill]]:
    """Parameter names, and how to fill each (a tensor of its shape). Where the layer specs differ in a name, both names
    are given."""
    share = _Share(reader, shape, place)
    yield "embedding.word_embeddings.weight", partial(share.vocabulary, EMBEDDING)
    yield "output_layer.weight", partial(share.vocabulary, OUTPUT if OUTPUT in reader else EMBEDDING)
    yield "decoder.final_layernorm.weight", partial(share.whole, FINAL_NORM)
    for position, layer in enumerate(model.decoder.layers):
        yield from _layer(share, f"decoder.layers.{position}.", f"layers.{layer.layer_number - 1}.")


def _layer(share: "_Share", to: str, source: str) -> Iterator[tuple[str, Fill]]:
    attention, mlp = f"{to}self_attention.", f"{to}mlp."
    before_attention = partial(share.whole, f"{source}input_layernorm.weight")
    before_mlp = partial(share.whole, f"{source}post_attention_layernorm.weight")
    yield f"{to}input_layernorm.weight", before_attention
    yield f"{attention}linear_qkv.layer_norm_weight", before_attention  # Transformer Engine's spec
    yield f"{to}pre_mlp_layernorm.weight", before_mlp
    yield f"{mlp}linear_fc1.layer_norm_weight", before_mlp  # Transformer Engine's spec
    yield f"{attention}linear_qkv.weight", partial(share.qkv, f"{source}self_attn.{{}}_proj.weight")
    yield f"{attention}linear_qkv.bias", partial(share.qkv, f"{source}self_attn.{{}}_proj.bias")
    yield f"{attention}linear_proj.weight", partial(share.columns, f"{source}self_attn.o_proj.weight")
    yield f"{mlp}linear_fc1.weight", partial(share.gate_up, f"{source}mlp.{{}}_proj.weight")
    yield f"{mlp}linear_fc2.weight", partial(share.columns, f"{source}mlp.down_proj.weight")


class _Share:
    """One tp rank's part of each kind of tensor, copied into a parameter."""

    def __init__(self, reader: Reader, shape: DecoderShape, place: Place) -> None:
        self._reader, self._shape = reader, shape
        self._rank, self._tp = place.tp, place.topology.tp

    def whole(self, name: str, parameter: Tensor) -> None:
        parameter.copy_(self._reader.read(name))

    def columns(self, name: str, parameter: Tensor) -> None:
        """[hidden, inner / tp]"""
        part = parameter.shape[1]
        parameter.copy_(self._reader.read(name, slice(None), self._part(part)))

    def gate_up(self, pattern: str, parameter: Tensor) -> None:
        """[2 * ffn / tp, hidden], gate before up."""
        for half, name in zip(parameter.chunk(2), ("gate", "up"), strict=True):
            half.copy_(self._reader.read(pattern.format(name), self._part(half.shape[0])))

    def qkv(self, pattern: str, parameter: Tensor) -> None:
        """[groups / tp * (heads per group + 2) * head_dim, hidden], or without hidden for a bias."""
        shape = self._shape
        groups, per_group = shape.num_query_groups // self._tp, shape.num_heads // shape.num_query_groups
        by_group = parameter.unflatten(0, (groups, -1))
        sizes = [heads * shape.head_dim for heads in (per_group, 1, 1)]
        for part, name in zip(by_group.split(sizes, dim=1), "qkv", strict=True):
            rows = self._part(groups * part.shape[1])
            part.copy_(self._reader.read(pattern.format(name), rows).unflatten(0, (groups, -1)))

    def vocabulary(self, name: str, parameter: Tensor) -> None:
        """[padded vocabulary / tp, hidden]; rows past the vocabulary, on the last ranks, are zero."""
        rows = self._part(parameter.shape[0])
        held = max(0, min(rows.stop, self._shape.vocab_size) - rows.start)
        if held:
            parameter[:held].copy_(self._reader.read(name, slice(rows.start, rows.start + held)))
        parameter[held:].zero_()

    def _part(self, size: int) -> slice:
        """This rank's of equal parts of ``size``."""
        return slice(self._rank * size, (self._rank + 1) * size)
