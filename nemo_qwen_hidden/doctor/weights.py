"""Hypotheses about the model itself: weights put in the wrong places, and settings of another model.

N: query heads, G: key/value groups, D: size of a head, H: hidden, F: inner units of the MLP.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_qwen_hidden.doctor.hypothesis import Hypothesis, Turn
from nemo_qwen_hidden.doctor.observation import States
from nemo_qwen_hidden.doctor.reference import Edit, Edits, Reference
from nemo_qwen_hidden.hookpoint import ROT_K, ROT_Q, K, Q, Z

ROPE_BASES = (1e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7)
EPSILONS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
RANKS = (2, 4, 8)


def hypotheses(reference: Reference) -> Iterator[Hypothesis]:
    """Those that make sense for this model."""
    yield from _rotary(reference)
    yield from _biases()
    yield from _attention(reference)
    yield from _mlp(reference)
    yield from _norms(reference)
    yield from _reduction(reference)
    yield from _embedding(reference)


def _model(fault: str, says: str, edit: Edit, turn: Turn | None = None) -> Hypothesis:
    return Hypothesis(fault=fault, says=says, edits=(edit,), turn=turn)


def _put_back(sites: Sequence[str], order: Tensor, *, size: int, within: bool) -> Turn:
    """For an edit that reorders heads, or the units within each: undoes it in the states at ``sites``."""
    back = order.argsort()

    def turn(states: States) -> States:
        def moved(values: Tensor) -> Tensor:
            heads: Tensor = values.unflatten(1, (-1, size))
            return (heads[:, :, back] if within else heads[:, back]).flatten(1)

        return {point: moved(values) if point.site in sites else values for point, values in states.items()}

    return turn


# Rotary embedding


def rope_base(base: float) -> Edit:
    """Another theta."""

    def edit(reference: Reference, edits: Edits) -> None:
        rotary, dim = reference.model.rotary_emb, reference.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        edits.attribute(rotary, "inv_freq", 1.0 / base**exponents)

    return edit


def own_rope_base(reference: Reference) -> float:
    """The theta of the model."""
    return float(reference.config.rope_theta)


def rope_base_hypothesis(base: float, own: float, *, fitted: bool = False) -> Hypothesis:
    """The model was run with ``base`` instead of its ``own`` theta. fitted: ``base`` is as near as the error tells."""
    said = f"about {base:,.0f}" if fitted else f"{base:.6g}"
    return _model("rope-base", f"the rotary base is {said}, where the model's is {own:.6g}", rope_base(base))


def _rotary(reference: Reference) -> Iterator[Hypothesis]:
    own = own_rope_base(reference)
    yield from (rope_base_hypothesis(base, own) for base in ROPE_BASES if base != own)

    def scaled(reference: Reference, edits: Edits, factor: float) -> None:
        rotary = reference.model.rotary_emb
        edits.attribute(rotary, "inv_freq", rotary.inv_freq * factor)

    yield _model("rope-missing", "no rotary embedding is applied", partial(scaled, factor=0.0))
    for factor in (2, 4, 8):
        says = f"positions are {{}} by {factor} before the rotary embedding"
        yield _model("rope-scaled", says.format("divided"), partial(scaled, factor=1 / factor))
        yield _model("rope-scaled", says.format("multiplied"), partial(scaled, factor=float(factor)))

    dim = reference.head_dim
    pairs = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])

    def interleaved(reference: Reference, edits: Edits) -> None:
        """Neighbouring units of a head become the pairs that transformers makes of its two halves."""
        for projection in _projections(reference, "qk"):
            _rows(edits, projection, lambda heads: heads[:, pairs], dim)

    says = "the rotary embedding turns neighbouring units of a head, not its two halves"
    yield _model("rope-interleaved", says, interleaved, _put_back((Q, K, ROT_Q, ROT_K), pairs, size=dim, within=True))


def _projections(reference: Reference, names: str) -> Iterator[nn.Linear]:
    for layer in reference.blocks:
        for name in names:
            yield getattr(layer.self_attn, f"{name}_proj")


def _rows(edits: Edits, projection: Any, change: Callable[[Tensor], Tensor], dim: int) -> None:
    """Changes a projection by its heads, [heads, D, ...], its bias too."""
    for parameter in (projection.weight, projection.bias):
        if parameter is not None:
            edits.weight(parameter, change(parameter.data.unflatten(0, (-1, dim))).flatten(0, 1))


# Biases


def _biases() -> Iterator[Hypothesis]:
    def scaled(reference: Reference, edits: Edits, names: str, factor: float) -> None:
        for projection in _projections(reference, names):
            edits.weight(projection.bias, projection.bias.data * factor)

    for names in ("qkv", "q", "k", "v", "qk", "kv", "qv"):
        said = ", ".join(names.upper())
        yield _model("qkv-bias-missing", f"the bias of {said} is not added", partial(scaled, names=names, factor=0.0))
    yield _model("qkv-bias-twice", "the bias of Q, K, V is added twice", partial(scaled, names="qkv", factor=2.0))


# Attention


def _attention(reference: Reference) -> Iterator[Hypothesis]:
    heads, groups = reference.config.num_attention_heads, reference.config.num_key_value_heads
    dim = reference.head_dim

    def in_order(reference: Reference, edits: Edits) -> None:
        for layer in reference.blocks:
            attention = layer.self_attn
            for kind in ("weight", "bias"):
                parts = [getattr(getattr(attention, f"{name}_proj"), kind) for name in "qkv"]
                by_group = torch.cat([part.data for part in parts]).unflatten(0, (groups, -1))
                sizes = [heads // groups * dim, dim, dim]
                for part, piece in zip(parts, by_group.split(sizes, dim=1), strict=True):
                    edits.weight(part, piece.flatten(0, 1))

    if groups > 1:
        says = "rows of the fused QKV weight stand as all of Q, all of K, all of V, and are read by query group"
        yield _model("qkv-layout", says, in_order)

    def exchanged(reference: Reference, edits: Edits, one: str, other: str) -> None:
        for layer in reference.blocks:
            first, second = (getattr(layer.self_attn, f"{name}_proj") for name in (one, other))
            for left, right in ((first.weight, second.weight), (first.bias, second.bias)):
                values = left.data
                edits.weight(left, right.data)
                edits.weight(right, values)

    pairs = [("k", "v"), *([("q", "k"), ("q", "v")] if heads == groups else [])]
    for one, other in pairs:
        says = f"the weights of {one.upper()} and {other.upper()} are swapped"
        yield _model("qkv-swapped", says, partial(exchanged, one=one, other=other))

    order = torch.tensor([head for group in range(groups) for head in range(heads) if head % groups == group])

    def tiled(reference: Reference, edits: Edits) -> None:
        """Head h is moved to where transformers gives it the keys of group h % G."""
        for layer in reference.blocks:
            attention = layer.self_attn
            _rows(edits, attention.q_proj, lambda rows: rows[order], dim)
            _columns(edits, attention.o_proj, lambda columns: columns[:, order], dim)

    if 1 < groups < heads:
        says = "query heads take the keys and values of group (head mod groups), not of their own group"
        yield _model("kv-groups", says, tiled, _put_back((Q, ROT_Q, Z), order, size=dim, within=False))

    def blocks(reference: Reference, edits: Edits, ranks: int) -> None:
        for layer in reference.blocks:
            _columns(edits, layer.self_attn.o_proj, partial(torch.roll, shifts=1, dims=1), heads // ranks * dim)

    for ranks in RANKS:
        if heads % ranks == 0 and groups % ranks == 0:
            says = f"the heads of {ranks} tensor parallel ranks come to the output projection in the wrong order"
            yield _model("heads-permuted", says, partial(blocks, ranks=ranks))

    def unscaled(reference: Reference, edits: Edits, factor: float) -> None:
        for layer in reference.blocks:
            edits.attribute(layer.self_attn, "scaling", layer.self_attn.scaling * factor)

    yield _model(
        "softmax-scale", "attention scores are not divided by sqrt(head size)", partial(unscaled, factor=dim**0.5)
    )
    yield _model("softmax-scale", "attention scores are divided by the head size", partial(unscaled, factor=dim**-0.5))


def _columns(edits: Edits, projection: Any, change: Callable[[Tensor], Tensor], size: int) -> None:
    """Changes a projection by blocks of its inputs, [outputs, blocks, size]."""
    edits.weight(projection.weight, change(projection.weight.data.unflatten(1, (-1, size))).flatten(1))


# MLP


def _mlp(reference: Reference) -> Iterator[Hypothesis]:
    def swapped(reference: Reference, edits: Edits) -> None:
        for layer in reference.blocks:
            gate, up = layer.mlp.gate_proj, layer.mlp.up_proj
            values = gate.weight.data
            edits.weight(gate.weight, up.weight.data)
            edits.weight(up.weight, values)

    yield _model("gate-up-swapped", "gate and up are swapped in the MLP", swapped)

    def by_rank(reference: Reference, edits: Edits, ranks: int) -> None:
        for layer in reference.blocks:
            gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
            halves = [part.chunk(2) for part in torch.cat([gate.data, up.data]).chunk(ranks)]
            edits.weight(gate, torch.cat([first for first, _ in halves]))
            edits.weight(up, torch.cat([second for _, second in halves]))

    def blocks(reference: Reference, edits: Edits, ranks: int) -> None:
        for layer in reference.blocks:
            down = layer.mlp.down_proj
            _columns(edits, down, partial(torch.roll, shifts=1, dims=1), down.in_features // ranks)

    for ranks in RANKS:
        if reference.config.intermediate_size % ranks == 0:
            says = f"all of gate, then all of up, was cut over {ranks} tensor parallel ranks, not each by itself"
            yield _model("gate-up-layout", says, partial(by_rank, ranks=ranks))
            says = f"inner units of {ranks} tensor parallel ranks come to the down projection in the wrong order"
            yield _model("units-permuted", says, partial(blocks, ranks=ranks))

    def activation(reference: Reference, edits: Edits, other: nn.Module) -> None:
        for layer in reference.blocks:
            edits.attribute(layer.mlp, "act_fn", other)

    others = (("GELU", nn.GELU()), ("GELU by tanh", nn.GELU(approximate="tanh")), ("ReLU", nn.ReLU()))
    for name, module in others:
        yield _model("activation", f"the MLP's activation is {name}, not SiLU", partial(activation, other=module))


# Norms


def _norms(reference: Reference) -> Iterator[Hypothesis]:
    own = float(reference.config.rms_norm_eps)

    def epsilon(reference: Reference, edits: Edits, value: float) -> None:
        for norm in norms_of(reference):
            edits.attribute(norm, "variance_epsilon", value)

    for value in EPSILONS:
        if value != own:
            says = f"the epsilon of the norms is {value:g}, where the model's is {own:g}"
            yield _model("norm-epsilon", says, partial(epsilon, value=value))

    def weights(reference: Reference, edits: Edits, which: str, change: Callable[[Tensor], Tensor]) -> None:
        for norm in norms_of(reference, which):
            edits.weight(norm.weight, change(norm.weight.data))

    for which, said in _NORMS.items():
        one = partial(weights, which=which, change=torch.ones_like)
        yield _model("norm-weight-missing", f"the weight of {said} is not applied", one)
    plus_one = partial(weights, which="all", change=lambda weight: weight + 1)
    yield _model("norm-weight-plus-one", "norms multiply by 1 + weight (zero-centred), not by the weight", plus_one)

    def centred(reference: Reference, edits: Edits) -> None:
        for norm in norms_of(reference):
            edits.attribute(norm, "forward", partial(_less_mean, norm.forward))

    yield _model("layer-norm", "the norms subtract the mean: LayerNorm, not RMSNorm", centred)


def _less_mean(norm: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return norm(values - values.mean(dim=-1, keepdim=True))


_NORMS = {
    "all": "the norms",
    "input_layernorm": "the norm before attention",
    "post_attention_layernorm": "the norm before the MLP",
    "final": "the final norm",
}


def norms_of(reference: Reference, which: str = "all") -> Iterator[Any]:
    """Norm modules: ``all``, ``final``, or those of one name in every layer."""
    for layer in reference.blocks:
        for name in ("input_layernorm", "post_attention_layernorm"):
            if which in ("all", name):
                yield getattr(layer, name)
    if which in ("all", "final"):
        yield reference.model.norm


# Sums over tensor parallel ranks


def _reduction(reference: Reference) -> Iterator[Hypothesis]:
    def scaled(reference: Reference, edits: Edits, factor: float, attention: bool, mlp: bool) -> None:
        for layer in reference.blocks:
            for used, projection in ((attention, layer.self_attn.o_proj), (mlp, layer.mlp.down_proj)):
                if used:
                    edits.weight(projection.weight, projection.weight.data * factor)

    blocks = ((True, True, "attention and MLP"), (True, False, "attention"), (False, True, "the MLP"))
    for factor in RANKS:
        for attention, mlp, said in blocks:
            often = partial(scaled, factor=float(factor), attention=attention, mlp=mlp)
            says = (
                f"the output of {said} is {factor} times too large: summed over {factor} ranks that each had it whole"
            )
            yield _model("summed-twice", says, often)
            seldom = partial(scaled, factor=1 / factor, attention=attention, mlp=mlp)
            says = f"the output of {said} is {factor} times too small: averaged over {factor} ranks, not summed"
            yield _model("averaged", says, seldom)

    def partial_sum(reference: Reference, edits: Edits, ranks: int, rank: int, attention: bool, mlp: bool) -> None:
        for layer in reference.blocks:
            for used, projection in ((attention, layer.self_attn.o_proj), (mlp, layer.mlp.down_proj)):
                if used:
                    kept = torch.zeros_like(projection.weight.data)
                    part = kept.shape[1] // ranks
                    columns = slice(rank * part, (rank + 1) * part)
                    kept[:, columns] = projection.weight.data[:, columns]
                    edits.weight(projection.weight, kept)

    heads, inner = reference.config.num_attention_heads, reference.config.intermediate_size
    for ranks in RANKS:
        if heads % ranks or inner % ranks:
            continue
        for rank in range(ranks):
            for attention, mlp, said in blocks:
                edit = partial(partial_sum, ranks=ranks, rank=rank, attention=attention, mlp=mlp)
                says = f"the output of {said} holds the part of rank {rank} of {ranks} alone: it was not summed over tp"
                yield _model("not-summed", says, edit)


# Embedding


def _embedding(reference: Reference) -> Iterator[Hypothesis]:
    def scaled(reference: Reference, edits: Edits, factor: float) -> None:
        weight = reference.model.embed_tokens.weight
        edits.weight(weight, weight.data * factor)

    hidden = reference.config.hidden_size
    edit = partial(scaled, factor=hidden**0.5)
    yield _model("embedding-scaled", f"embeddings are multiplied by sqrt(hidden size), {hidden**0.5:.4g}", edit)
    for ranks in RANKS:
        says = f"embeddings are {ranks} times too large: summed over {ranks} ranks that each had them"
        yield _model("summed-twice", says, partial(scaled, factor=float(ranks)))

    def ranges(reference: Reference, edits: Edits, ranks: int) -> None:
        """Tensor parallel ranks hold equal ranges of a table that is filled up with zeros."""
        weight = reference.model.embed_tokens.weight
        part = -(-len(weight) // ranks)
        padded = torch.nn.functional.pad(weight.data, (0, 0, 0, part * ranks - len(weight)))
        edits.weight(weight, padded.roll(-part, dims=0)[: len(weight)])

    for ranks in RANKS:
        says = f"ranges of the vocabulary are swapped between {ranks} tensor parallel ranks"
        yield _model("vocabulary", says, partial(ranges, ranks=ranks))
