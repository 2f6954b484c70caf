"""Taps: hooks that copy what passes a hook point, for the rows that are kept.

A hook only copies; what has to be exchanged between ranks is exchanged after the forward of the microbatch, hook
point by hook point in an order that all ranks share (``settle``).

C: tokens of the slice that a rank has of the sequence axis, B: sequences, W: numbers in one token's state, n: rows
kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_qwen_hidden.capture.attention import AttentionInputs, AttentionWeights
from nemo_qwen_hidden.capture.edits import BoundEdit
from nemo_qwen_hidden.capture.exchange import sum_over_ranks, to_full_width
from nemo_qwen_hidden.capture.rows import Choice, View
from nemo_qwen_hidden.capture.sites import visit_attention, visit_site
from nemo_qwen_hidden.errors import HiddenStatesError
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, SPLIT_SITES, HookPoint
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.plan.slices import Run
from nemo_qwen_hidden.trace.record import UNTRACED, Trace


@dataclass(frozen=True, kw_only=True)
class LocalSlice:
    """What one rank answers for of one hook point in one microbatch.

    values: [n, W] in the compute dtype, means in fp32, a copy of its own; its rows are those that ``runs`` keep, in
    order. divisor: fp32 [n], behind the final norm alone: what the norm divided each row by, so that the state before
    it can be had again.
    """

    hook_point: HookPoint
    microbatch: int
    runs: tuple[Run, ...]
    values: Tensor
    divisor: Tensor | None = None


Sink = Callable[[LocalSlice], None]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What is captured. points: on any stage. choice: which rows; None is all. attention: how attention weights are
    wanted, where they are. edits: what is changed on the way; a state is captured as it goes on."""

    points: tuple[HookPoint, ...]
    edits: tuple[BoundEdit, ...] = ()
    choice: Choice | None = None
    attention: AttentionWeights = field(default_factory=AttentionWeights)

    @property
    def pools(self) -> bool:
        """Whether there is one state for each segment, instead of one for each row."""
        return self.choice is not None and self.choice.weights is not None

    def dtype(self, compute: torch.dtype) -> torch.dtype:
        """Of what a sink gets: sums are not rounded to the compute dtype."""
        return torch.float32 if self.pools else compute


class Taps:
    """Hooks on the modules of one stage; ``view`` is set before each microbatch, and ``settle`` is called after it."""

    def __init__(
        self, capture: Capture, groups: ProcessGroups, sink: Sink, *, norm_epsilon: float, trace: Trace
    ) -> None:
        self._capture, self._groups, self._sink, self._norm_epsilon = capture, groups, sink, norm_epsilon
        self._trace = trace
        self._split: dict[HookPoint, Tensor] = {}
        self._sums: dict[HookPoint, Tensor] = {}
        self._attended: dict[HookPoint, AttentionInputs] = {}
        self.view: View | None = None

    def record(self, point: HookPoint, state_CBW: Tensor, before_CBW: Tensor) -> None:
        """Copies rows before anything later can change them in place.

        before_CBW: the input of the module whose output ``state_CBW`` is.
        """
        view = self.view
        if view is None:
            return
        with self._trace.span("tap", hook_point=point):
            self._take(view, point, state_CBW.detach(), before_CBW)

    def _take(self, view: View, point: HookPoint, state_CBW: Tensor, before_CBW: Tensor) -> None:
        split = point.site in SPLIT_SITES
        if self._capture.pools:
            self._sums[point] = self._weighted_sums(view, state_CBW, split=split)
        elif split:
            runs = [run for stripe in view.stripes for run in stripe]
            self._split[point] = copy_rows(state_CBW, runs)
        elif view.runs:
            values, divisor = copy_rows(state_CBW, view.runs, first_index=view.first_index), None
            if point.normed:
                before = copy_rows(before_CBW.detach(), view.runs, first_index=view.first_index).float()
                divisor = (before.square().mean(dim=1) + self._norm_epsilon).sqrt()
            self._emit(point, values, divisor)

    def replace(self, edit: BoundEdit, state_CBH: Tensor, _before: Tensor) -> Tensor | None:
        """What goes on in place of a state."""
        return None if self.view is None else edit(state_CBH, self.view)

    def record_attention(self, point: HookPoint, query: Tensor, key: Tensor) -> None:
        """Copies the queries of kept rows, and all keys."""
        if self.view is None:
            return
        with self._trace.span("tap", hook_point=point):
            self._attended[point] = AttentionInputs.of(
                self.view, query.detach(), key.detach(), self._capture.attention, self._groups.place
            )

    def settle(self) -> None:
        """Finishes the microbatch: exchanges what tp and cp ranks have only parts of. Collective over both."""
        view = self.view
        assert view is not None
        for point in self._capture.points:
            if (attended := self._attended.pop(point, None)) is not None:
                self._split[point] = attended.weights(self._groups)
            if (sums := self._sums.pop(point, None)) is not None:
                self._settle_sums(view, point, sums)
            elif (values := self._split.pop(point, None)) is not None:
                self._emit_full_width(view, point, values)
        self.view = None

    def _settle_sums(self, view: View, point: HookPoint, sums: Tensor) -> None:
        """sums: fp32 [segments, W of this rank], over the tokens that it has."""
        split = point.site in SPLIT_SITES
        over_tp = self._groups.topology.sp and not split
        sums = sum_over_ranks(sums, self._groups.tp_cp if over_tp else self._groups.cp)
        last = {s.first_row + s.length - 1: number for number, s in enumerate(view.microbatch.segments)}
        stripes = view.stripes if split else (view.runs,)
        rows = torch.tensor([last[run.first_row] for runs in stripes for run in runs], dtype=torch.int64)
        values = sums[rows.to(sums.device)]
        if split:
            self._emit_full_width(view, point, values)
        elif view.runs:
            self._emit(point, values, None)

    def _emit_full_width(self, view: View, point: HookPoint, values: Tensor) -> None:
        rows = [sum(run.kept for run in runs) for runs in view.stripes]
        widths = None
        if point.site == ATTN_WEIGHTS:
            widths = self._capture.attention.widths(self._groups.topology.tp)
        whole = to_full_width(values, rows, widths, self._groups.tp)
        if view.runs:
            self._emit(point, whole, None)

    def _weighted_sums(self, view: View, state_CBW: Tensor, *, split: bool) -> Tensor:
        """fp32 [segments, W of this rank]: of each segment the weighted sum of the rows that this rank has."""
        first_index = 0 if split else view.first_index
        runs = view.all_runs if split else view.residual_runs
        sums = state_CBW.new_zeros(len(view.microbatch.segments), state_CBW.shape[-1], dtype=torch.float32)
        number_of = view.microbatch.segment_numbers()
        for run in runs:
            number = number_of(run.first_row)
            weights = view.weights[number]
            if weights is not None:
                offset, start = run.first_row - view.microbatch.segments[number].first_row, run.index - first_index
                rows = state_CBW[start : start + run.length, run.sequence].float()
                sums[number] += weights[offset : offset + run.length].to(rows.device) @ rows
        return sums

    def _emit(self, point: HookPoint, values: Tensor, divisor: Tensor | None) -> None:
        view = self.view
        assert view is not None
        index = view.microbatch.index
        self._sink(LocalSlice(hook_point=point, microbatch=index, runs=view.runs, values=values, divisor=divisor))


def copy_rows(state_CBW: Tensor, runs: Sequence[Run], *, first_index: int = 0) -> Tensor:
    """The rows that ``runs`` keep, one after the other: [n, W], freshly allocated."""
    values = state_CBW.new_empty(sum(run.kept for run in runs), prod(state_CBW.shape[2:]))
    row = 0
    for run in runs:
        start = run.index - first_index
        rows = state_CBW[start : start + run.length, run.sequence]
        if run.picked is not None:
            rows = rows[torch.tensor(run.picked, device=rows.device)]
        values[row : row + run.kept].copy_(rows.flatten(1))
        row += run.kept
    return values


@contextmanager
def tapped(
    model: MCoreGPTModel,
    capture: Capture,
    points: Sequence[HookPoint],
    edits: Sequence[BoundEdit],
    groups: ProcessGroups,
    sink: Sink,
    trace: Trace = UNTRACED,
) -> Iterator[Taps]:
    """Puts hooks on those modules of this stage that ``points`` and ``edits`` name, edits first, and always takes them
    away again.

    Raises:
        HiddenStatesError: a hook point is not on this stage, or the decoder runs from CUDA graphs, which bypass hooks.
    """
    if getattr(model.config, "enable_cuda_graph", False) or getattr(model.config, "cuda_graph_impl", "none") != "none":
        raise HiddenStatesError("hidden states cannot be captured from CUDA graphs, which bypass hooks: turn them off")
    taps = Taps(capture, groups, sink, norm_epsilon=model.config.layernorm_epsilon, trace=trace)
    handles: list[RemovableHandle] = []
    try:
        for edit in edits:
            handles.append(visit_site(model, edit.edit.hook_point, partial(taps.replace, edit)))
        for point in points:
            if point.site == ATTN_WEIGHTS:
                handles.append(visit_attention(model, point, partial(taps.record_attention, point)))
            else:
                handles.append(visit_site(model, point, partial(taps.record, point)))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def part_of_decoder(model: MCoreGPTModel, layers: range, *, final_norm: bool) -> Iterator[None]:
    """While entered, the model runs those of its layers whose index is in ``layers``, then the final norm if
    ``final_norm``, and no output layer in any case."""
    decoder = model.decoder
    all_layers, norm, post_process = decoder.layers, decoder.final_layernorm, model.post_process
    try:
        decoder.layers = nn.ModuleList(layer for layer in all_layers if layer.layer_number - 1 in layers)
        if not final_norm:
            decoder.final_layernorm = None
        model.post_process = False
        yield
    finally:
        decoder.layers, decoder.final_layernorm, model.post_process = all_layers, norm, post_process
