"""Where each site is in Megatron's modules, and how a state is read or replaced there.

Sites are inputs and outputs of modules that Megatron's local layers and Transformer Engine's have in common; norms are
not among them but for the final one, since Transformer Engine fuses them into the next linear. Letters: C tokens that
this rank has (S / cp; at the residual sites under sequence parallelism a tp-th of that), B sequences, H hidden, N heads
and G groups of this rank, D size of a head.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_qwen_hidden import hookpoint as sites
from nemo_qwen_hidden.errors import HiddenStatesError
from nemo_qwen_hidden.hookpoint import HookPoint

Visit = Callable[[Tensor, Tensor], Tensor | None]
"""Gets a state [C, B, width] and what the module was given (for the final norm: the state before it). What it returns
takes the state's place; None leaves it."""

AttentionVisit = Callable[[Tensor, Tensor], None]
"""Gets queries [C, B, N, D] and keys [C, B, G, D] after rotary embedding."""


def visit_site(model: MCoreGPTModel, point: HookPoint, visit: Visit, *, prepend: bool = False) -> RemovableHandle:
    """Calls ``visit`` whenever the state at ``point`` passes, until the handle is removed; with ``prepend`` (at
    ``embed`` alone) before those that are there already.

    Layers are found by Megatron's own ``layer_number`` (1-based, over the whole model), never by position.

    Raises:
        HiddenStatesError: the hook point is not on this stage, or a layer is not built as a decoder's.
    """
    if point.site == sites.EMBED:
        embedding = getattr(model, "embedding", None) if model.pre_process else None
        return _after(_found(embedding, point), visit, prepend=prepend)
    if point.site == sites.FINAL_NORM:
        return _after(_found(model.decoder.final_layernorm, point), visit)
    layer = layer_of(model, point)
    attention = layer.self_attention
    match point.site:
        case sites.RESID_PRE:
            return _before(layer, visit)
        case sites.RESID_MID:
            # the identity between attention and MLP of a layer without cross attention, and its only input to both
            if not isinstance(layer.cross_attention, IdentityOp):
                raise HiddenStatesError(f"hook point {point} needs a layer without cross attention")
            return _after(layer.pre_cross_attn_layernorm, visit)
        case sites.RESID_POST:
            return _after(layer, visit)
        case sites.ATTN_OUT:
            return _after(attention, visit, adds_bias=True)
        case sites.MLP_OUT:
            return _after(layer.mlp, visit, adds_bias=True)
        case sites.Z:
            return _before(attention.linear_proj, visit)
        case sites.MLP_ACT:
            return _before(layer.mlp.linear_fc2, visit)
        case sites.Q | sites.K | sites.V:
            return _after(attention.linear_qkv, _one_of_qkv(point.site, attention, visit))
        case sites.ROT_Q | sites.ROT_K:
            return visit_attention(model, point, _one_of_attention(point.site, visit))
    raise HiddenStatesError(f"hook point {point} is no state of its own")


def has_site(model: MCoreGPTModel, point: HookPoint) -> bool:
    """Whether this stage has the module whose state ``point`` is."""
    if point.site == sites.EMBED:
        return bool(model.pre_process)
    if point.site == sites.FINAL_NORM:
        return model.decoder.final_layernorm is not None
    return any(layer.layer_number - 1 == point.layer for layer in model.decoder.layers)


def visit_attention(model: MCoreGPTModel, point: HookPoint, visit: AttentionVisit) -> RemovableHandle:
    """Calls ``visit`` with what the layer of ``point`` attends with."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        query, key = inputs[:2]  # packed sequences come without B
        visit(*(each if each.ndim == 4 else each[:, None] for each in (query, key)))

    core: nn.Module = layer_of(model, point).self_attention.core_attention
    return core.register_forward_pre_hook(hook)


def layer_of(model: MCoreGPTModel, point: HookPoint) -> Any:
    """The decoder layer of ``point``."""
    by_index = {layer.layer_number - 1: layer for layer in model.decoder.layers}
    return _found(by_index.get(point.layer), point)


def _found(module: Any, point: HookPoint) -> Any:
    if module is None:
        raise HiddenStatesError(f"hook point {point} is not on this pipeline stage")
    return module


def _after(module: nn.Module, visit: Visit, *, adds_bias: bool = False, prepend: bool = False) -> RemovableHandle:
    """What a module gives: a state, or a state and something beside it. ``adds_bias``: that something is a bias, or
    None, which Megatron adds outside of the module; the state is their sum."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        state, beside = output if isinstance(output, tuple) else (output, None)
        if adds_bias and beside is not None:
            state = state + beside
        replaced = visit(state, inputs[0] if inputs else state)
        if replaced is None:
            return None
        return (replaced, None if adds_bias else beside) if isinstance(output, tuple) else replaced

    return module.register_forward_hook(hook, prepend=prepend)


def _before(module: nn.Module, visit: Visit) -> RemovableHandle:
    """What a module is given first, by position or as ``hidden_states``."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        replaced = visit(state, state)
        if replaced is None:
            return None
        return ((replaced, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": replaced})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _one_of_qkv(site: str, attention: Any, visit: Visit) -> Visit:
    """Queries, keys or values out of what the fused linear gives: [C, B, G * (N/G + 2) * D], by query group."""

    def read(mixed: Tensor, _given: Tensor) -> None:
        groups = attention.num_query_groups_per_partition
        per_group = attention.num_attention_heads_per_partition // groups
        by_group = mixed.unflatten(-1, (groups, per_group + 2, -1))
        heads = {sites.Q: slice(0, per_group), sites.K: slice(per_group, per_group + 1), sites.V: slice(-1, None)}[site]
        state = by_group[..., heads, :].flatten(2)
        visit(state, state)

    return read


def _one_of_attention(site: str, visit: Visit) -> AttentionVisit:
    def read(query: Tensor, key: Tensor) -> None:
        state = (query if site == sites.ROT_Q else key).flatten(2)
        visit(state, state)

    return read
