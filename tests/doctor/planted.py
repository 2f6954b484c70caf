"""Faults planted in states of a plain transformers model, by scripts that share no code with the doctor.

Each takes a ``Case`` and gives the states that would have been stored. Names of the functions are only labels.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_qwen_hidden.hookpoint import HookPoint

RESIDUAL = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
States = dict[HookPoint, Tensor]


@dataclass(frozen=True)
class Case:
    """A model's folder and documents of token ids."""

    folder: Path
    documents: tuple[Tensor, ...]

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()

    def changed(self, change: Callable[[Any], None]) -> Any:
        """A copy of the model with something changed in it."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            change(model)
        return model

    def run(self, model: Any = None, **inputs: Any) -> States:
        """Every document alone."""
        return join([states_of(model or self.model, ids, **inputs) for ids in self.documents])

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.documents]


def states_of(model: Any, ids: Tensor, *, tokens: slice = slice(None), **inputs: Any) -> States:
    """Residual sites of every layer, [tokens, hidden], by the model's own modules; one sequence."""
    found: States = {}
    handles = []

    def keep(point: HookPoint) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[point] = (output[0] if isinstance(output, tuple) else output)[0].float()

        return hook

    def keep_input(point: HookPoint) -> Any:
        def hook(_module: nn.Module, args: Any) -> None:
            found[point] = args[0][0].float()

        return hook

    handles.append(model.embed_tokens.register_forward_hook(keep(HookPoint("embed"))))
    for index, layer in enumerate(model.layers):
        handles.append(layer.self_attn.register_forward_hook(keep(HookPoint("attn_out", index))))
        handles.append(
            layer.post_attention_layernorm.register_forward_pre_hook(keep_input(HookPoint("resid_mid", index)))
        )
        handles.append(layer.mlp.register_forward_hook(keep(HookPoint("mlp_out", index))))
        handles.append(layer.input_layernorm.register_forward_pre_hook(keep_input(HookPoint("resid_pre", index))))
        handles.append(layer.register_forward_hook(keep(HookPoint("resid_post", index))))
    handles.append(model.norm.register_forward_hook(keep(HookPoint("final_norm"))))
    try:
        with torch.no_grad():
            model(ids[None], use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {point: values[tokens].clone() for point, values in found.items()}


def join(documents: Sequence[States]) -> States:
    return {point: torch.cat([states[point] for states in documents]) for point in documents[0]}


def every(model: Any, *names: str) -> list[Any]:
    """Modules of all layers by dotted name."""
    return [layer.get_submodule(name) for layer in model.layers for name in names]


# The model


def rope_base(case: Case, base: float) -> States:
    def change(model: Any) -> None:
        dim = model.config.hidden_size // model.config.num_attention_heads
        model.rotary_emb.inv_freq = base ** (-torch.arange(0, dim, 2).float() / dim)

    return case.run(case.changed(change))


def zero_biases(case: Case, *names: str) -> States:
    def change(model: Any) -> None:
        for module in every(model, *(f"self_attn.{name}_proj" for name in names)):
            module.bias.zero_()

    return case.run(case.changed(change))


def gate_and_up_swapped(case: Case) -> States:
    def change(model: Any) -> None:
        for mlp in every(model, "mlp"):
            mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj

    return case.run(case.changed(change))


def norm_epsilon(case: Case, value: float) -> States:
    def change(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = value

    return case.run(case.changed(change))


def norm_weights(case: Case, change_weight: Callable[[Tensor], Tensor]) -> States:
    def change(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.weight.copy_(change_weight(module.weight))

    return case.run(case.changed(change))


def rope_interleaved(case: Case) -> States:
    """GPT-J's rotary embedding, written with complex numbers."""
    from transformers.models.qwen2 import modeling_qwen2

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2
        turn = torch.complex(cos[..., :half], sin[..., :half])[:, None]
        turned = [torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * turn for x in (q, k)]
        return tuple(torch.view_as_real(x).flatten(-2) for x in turned)  # type: ignore[return-value]

    kept = modeling_qwen2.apply_rotary_pos_emb
    modeling_qwen2.apply_rotary_pos_emb = rotate
    try:
        return case.run()
    finally:
        modeling_qwen2.apply_rotary_pos_emb = kept


def layers_in_order(case: Case, order: Sequence[int]) -> States:
    def change(model: Any) -> None:
        model.layers = nn.ModuleList([copy.deepcopy(model.layers[index]) for index in order])

    return case.run(case.changed(change))


def qkv_rows_in_order(case: Case) -> States:
    """What a fused weight [Q; K; V] is to a program that reads [q k v of group 0; q k v of group 1; ...]."""

    def change(model: Any) -> None:
        config = model.config
        groups = config.num_key_value_heads
        dim = config.hidden_size // config.num_attention_heads
        for attention in every(model, "self_attn"):
            for kind in ("weight", "bias"):
                parts = [getattr(getattr(attention, f"{name}_proj"), kind) for name in "qkv"]
                fused = torch.cat([part.data for part in parts])
                per_group = len(fused) // groups
                rows: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
                for group in range(groups):
                    block = fused[group * per_group : (group + 1) * per_group]
                    rows[0].append(block[: per_group - 2 * dim])
                    rows[1].append(block[per_group - 2 * dim : per_group - dim])
                    rows[2].append(block[per_group - dim :])
                for index, part in enumerate(parts):
                    part.copy_(torch.cat(rows[index]))

    return case.run(case.changed(change))


def half_of_a_sum(case: Case, *names: str) -> States:
    """Each projection sums over the first half of its inputs alone: rank 0 of two, without the all-reduce."""

    def change(model: Any) -> None:
        for projection in every(model, *names):
            projection.weight[:, projection.in_features // 2 :] = 0

    return case.run(case.changed(change))


def vocabulary_halves_swapped(case: Case) -> States:
    """The table of two tensor parallel ranks, the second filled up with a row of zeros, each holding the other's."""

    def change(model: Any) -> None:
        weight = model.embed_tokens.weight
        half = (len(weight) + 1) // 2
        full = torch.cat([weight.data, torch.zeros(2 * half - len(weight), weight.shape[1])])
        model.embed_tokens.weight.copy_(torch.cat([full[half:], full[:half]])[: len(weight)])

    return case.run(case.changed(change))


def multiplied_embeddings(case: Case, factor: float) -> States:
    return case.run(case.changed(lambda model: model.embed_tokens.weight.mul_(factor)))


def gelu(case: Case) -> States:
    def change(model: Any) -> None:
        for mlp in every(model, "mlp"):
            mlp.act_fn = nn.GELU()

    return case.run(case.changed(change))


def other_weights_in_layer(case: Case, layer: int) -> States:
    def change(model: Any) -> None:
        weight = model.layers[layer].mlp.down_proj.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)), alpha=0.01)

    return case.run(case.changed(change))


def fine_tuned(case: Case) -> States:
    def change(model: Any) -> None:
        generator = torch.Generator().manual_seed(6)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)

    return case.run(case.changed(change))


def with_dropout(case: Case, rate: float) -> States:
    """Dropout on the embeddings, as Megatron's ``hidden_dropout`` has it."""
    torch.manual_seed(0)

    def change(model: Any) -> None:
        model.embed_tokens.register_forward_hook(lambda _m, _a, out: nn.functional.dropout(out, rate, training=True))

    return case.run(case.changed(change))


# Inputs


def _mask(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, -1e30)[None, None]


def not_causal(case: Case) -> States:
    found = [
        states_of(case.model, ids, attention_mask=_mask(torch.ones(len(ids), len(ids), dtype=torch.bool)))
        for ids in case.documents
    ]
    return join(found)


def documents_leak(case: Case, *, anew: bool) -> States:
    ids = torch.cat(case.documents)
    positions = torch.cat([torch.arange(length) for length in case.lengths]) if anew else torch.arange(len(ids))
    mask = _mask(torch.ones(len(ids), len(ids), dtype=torch.bool).tril())
    return states_of(case.model, ids, attention_mask=mask, position_ids=positions[None])


def positions(case: Case, change: Callable[[Tensor], Tensor]) -> States:
    found = []
    for ids in case.documents:
        mask = _mask(torch.ones(len(ids), len(ids), dtype=torch.bool).tril())
        moved = change(torch.arange(len(ids)))
        found.append(states_of(case.model, ids, attention_mask=mask, position_ids=moved[None]))
    return join(found)


def padded_left(case: Case, *, masked: bool, misread: bool, pad: int = 0) -> States:
    """As tokenizers with ``padding_side="left"`` do it."""
    longest, found = max(case.lengths), []
    for ids in case.documents:
        count = longest - len(ids)
        padded = torch.cat([torch.full((count,), pad), ids])
        attention_mask = torch.ones(1, longest, dtype=torch.int64)
        if masked:
            attention_mask[0, :count] = 0
        tokens = slice(0, len(ids)) if misread else slice(count, longest)
        found.append(states_of(case.model, padded, tokens=tokens, attention_mask=attention_mask))
    return join(found)


def renamed_tokens(case: Case, rename: Callable[[Tensor], Tensor]) -> States:
    return Case(case.folder, tuple(rename(ids) for ids in case.documents)).run(case.model)


# States


def rows_of_each(case: Case, order: Callable[[int], Sequence[int]]) -> States:
    """The tokens of every document in another order."""
    places: list[int] = []
    for length in case.lengths:
        start = len(places)
        places += [start + token for token in order(length)]
    return {point: values[places] for point, values in case.run().items()}


def zigzag(length: int, ranks: int) -> list[int]:
    """Tokens as context parallel ranks hold them, rank after rank; padding at the end left out."""
    size = -(-length // (2 * ranks))
    held = []
    for rank in range(ranks):
        held += list(range(rank * size, (rank + 1) * size))
        held += list(range((2 * ranks - 1 - rank) * size, (2 * ranks - rank) * size))
    return [token for token in held if token < length]


def second_half_first(length: int) -> list[int]:
    half = -(-length // 2)
    return [*range(half, length), *range(half)]


def shuffled(length: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(length)).tolist()


def documents_in_order(case: Case, order: Sequence[int]) -> States:
    found = [states_of(case.model, ids) for ids in case.documents]
    return join([found[index] for index in order])


def token_by_token(case: Case) -> States:
    """[tokens, batch] read as [batch, tokens]."""
    found = [states_of(case.model, ids) for ids in case.documents]
    order = [(t, d) for t in range(max(case.lengths)) for d in range(len(found)) if t < case.lengths[d]]
    return {point: torch.stack([found[d][point][t] for t, d in order]) for point in found[0]}


def one_layer_early(case: Case) -> States:
    """``hidden_states[i]`` stored as layer i, which is what came out of layer i - 1."""
    right = case.run()
    names = {f"resid_post@{layer}": f"resid_post@{layer - 1}" for layer in range(1, len(case.model.layers))}
    names["resid_post@0"] = "embed"
    return {HookPoint.parse(to): right[HookPoint.parse(source)] for to, source in names.items()}


def hidden_states_tuple(case: Case) -> States:
    """transformers' own tuple, its last entry taken for the output of the last layer."""
    found = []
    for ids in case.documents:
        with torch.no_grad():
            states = case.model(ids[None], output_hidden_states=True).hidden_states
        named = {HookPoint("embed"): states[0][0]}
        named |= {HookPoint("resid_post", layer): state[0] for layer, state in enumerate(states[1:])}
        found.append(named)
    return join(found)


def edited(case: Case, edit: Callable[[States], Any]) -> States:
    states = {point: values.clone() for point, values in case.run().items()}
    edit(states)
    return states


def cast(case: Case, dtype: torch.dtype) -> States:
    return {point: values.to(dtype).float() for point, values in case.run().items()}


def computed_in(case: Case, dtype: torch.dtype) -> States:
    return case.run(copy.deepcopy(case.model).to(dtype))
