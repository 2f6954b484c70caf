"""Taps: forward hooks that copy what passes a hook point, for the rows that this rank answers for.

C: tokens of the slice that a rank has of the sequence axis, B: sequences, H: hidden, n: rows copied.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor, nn

from nemo_qwen_hidden.errors import HiddenStatesError
from nemo_qwen_hidden.hookpoint import EMBED, FINAL_NORM, HookPoint
from nemo_qwen_hidden.plan.microbatches import Microbatch
from nemo_qwen_hidden.plan.slices import Run, runs_within


@dataclass(frozen=True, kw_only=True)
class LocalSlice:
    """What one rank holds of one hook point in one microbatch.

    values: [n, H] in the compute dtype, a copy of its own; its rows are those of ``runs``, in order. divisor: fp32 [n],
    behind the final norm alone: what the norm divided each row by, so that the state before it can be had again.
    """

    hook_point: HookPoint
    microbatch: int
    runs: tuple[Run, ...]
    values: Tensor
    divisor: Tensor | None = None


Sink = Callable[[LocalSlice], None]


@dataclass(frozen=True, kw_only=True)
class View:
    """What the hooks have to know of the microbatch that is running.

    owned: tokens of the sequence axis whose rows this rank answers for. first_token: the token of the sequence axis
    at index 0 of this rank's tensors.
    """

    microbatch: Microbatch
    owned: range
    first_token: int


class Taps:
    """Hooks on the modules of one stage; ``view`` is set before each microbatch and cleared after it."""

    def __init__(self, sink: Sink, *, norm_epsilon: float) -> None:
        self._sink, self._norm_epsilon = sink, norm_epsilon
        self.view: View | None = None

    def record(self, point: HookPoint, hidden_CBH: Tensor, before_CBH: Tensor) -> None:
        """Copies the owned rows before anything later can change them in place, and hands them to the sink.

        before_CBH: the input of the module whose output ``hidden_CBH`` is.
        """
        if self.view is None:
            return
        runs = tuple(runs_within(self.view.microbatch, self.view.owned))
        if not runs:
            return
        first_token, divisor = self.view.first_token, None
        values = copy_rows(hidden_CBH.detach(), runs, first_token=first_token)
        if point.normed:
            before = copy_rows(before_CBH.detach(), runs, first_token=first_token).float()
            divisor = (before.square().mean(dim=1) + self._norm_epsilon).sqrt()
        index = self.view.microbatch.index
        self._sink(LocalSlice(hook_point=point, microbatch=index, runs=runs, values=values, divisor=divisor))


def copy_rows(hidden_CBH: Tensor, runs: Sequence[Run], *, first_token: int) -> Tensor:
    """The rows of ``runs``, one after the other: [n, H], freshly allocated."""
    values = hidden_CBH.new_empty(sum(run.length for run in runs), hidden_CBH.shape[-1])
    row = 0
    for run in runs:
        start = run.token - first_token
        values[row : row + run.length].copy_(hidden_CBH[start : start + run.length, run.sequence])
        row += run.length
    return values


@contextmanager
def tapped(model: MCoreGPTModel, points: Sequence[HookPoint], sink: Sink) -> Iterator[Taps]:
    """Puts hooks on those modules of this stage that ``points`` name, and always takes them away again.

    Raises:
        HiddenStatesError: a hook point is not on this stage, or the decoder runs from CUDA graphs, which bypass hooks.
    """
    if getattr(model.config, "enable_cuda_graph", False) or getattr(model.config, "cuda_graph_impl", "none") != "none":
        raise HiddenStatesError("hidden states cannot be captured from CUDA graphs, which bypass hooks: turn them off")
    taps, handles = Taps(sink, norm_epsilon=model.config.layernorm_epsilon), []
    try:
        for point in points:
            module = module_of(model, point)

            def hook(_module: nn.Module, inputs: tuple[Any, ...], output: object, point: HookPoint = point) -> None:
                hidden = output[0] if isinstance(output, tuple) else output  # a layer returns (hidden, context)
                assert isinstance(hidden, torch.Tensor)
                taps.record(point, hidden, inputs[0] if point.normed else hidden)

            handles.append(module.register_forward_hook(hook))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def module_of(model: MCoreGPTModel, point: HookPoint) -> nn.Module:
    """The module of this stage whose output is the state at ``point``.

    Layers are found by Megatron's own ``layer_number`` (1-based, over the whole model), never by position.
    """
    found: nn.Module | None = None
    if point.site == EMBED:
        found = getattr(model, "embedding", None) if model.pre_process else None
    elif point.site == FINAL_NORM:
        found = model.decoder.final_layernorm
    else:
        by_index = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        found = by_index.get(point.layer)
    if found is None:
        raise HiddenStatesError(f"hook point {point} is not on this pipeline stage")
    return found


@contextmanager
def decoder_of_depth(model: MCoreGPTModel, depth: int, *, final_norm: bool) -> Iterator[None]:
    """While entered, the model ends after its first ``depth`` layers (counted over all stages), before the final norm
    unless ``final_norm``, and before an output layer in any case."""
    decoder = model.decoder
    all_layers, norm, post_process = decoder.layers, decoder.final_layernorm, model.post_process
    try:
        decoder.layers = nn.ModuleList(layer for layer in all_layers if layer.layer_number <= depth)
        if not final_norm:
            decoder.final_layernorm = None
        model.post_process = False
        yield
    finally:
        decoder.layers, decoder.final_layernorm, model.post_process = all_layers, norm, post_process
