"""Gradients through the pipeline: a vector-Jacobian product, microbatch by microbatch.

Each microbatch goes forward through all stages with its graph kept, then back: a stage gets the gradient of what it
sent, adds the seeds of its own hook points, and sends back the gradient of what it received. Parameters are frozen
meanwhile, so that nothing is spent on theirs. C: this rank's tokens, B: sequences, H: hidden.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_qwen_hidden.capture.pipeline import Pipeline, Stage, StateRows, TokenRows
from nemo_qwen_hidden.capture.rows import lay_out
from nemo_qwen_hidden.capture.sites import visit_site
from nemo_qwen_hidden.capture.taps import LocalSlice, Sink, Taps, copy_rows
from nemo_qwen_hidden.hookpoint import EMBED, HookPoint
from nemo_qwen_hidden.parallel.watch import wait_for_peer
from nemo_qwen_hidden.plan.microbatches import Microbatch

Seeds = Mapping[HookPoint, StateRows]
"""For hook points, (first row, length) to the gradient of the outcome with respect to these states, [length, H]."""


@dataclass
class Graph:
    """What a stage keeps of a microbatch between forward and backward: its root, and states by hook point."""

    root: Tensor | None = None
    states: dict[HookPoint, Tensor] = field(default_factory=dict)


class BackwardPass:
    """Gradients of an outcome with respect to states and to parameters of edits."""

    def __init__(self, pipeline: Pipeline, *, wanted: Sequence[HookPoint], seeds: Seeds) -> None:
        self._pipeline, self._wanted, self._seeds = pipeline, wanted, seeds
        self._parameters = [p for bound in pipeline.capture.edits for p in bound.edit.parameters if p.requires_grad]
        self.parameter_gradients = [torch.zeros_like(parameter) for parameter in self._parameters]

    def run(self, microbatches: Iterable[Microbatch], tokens: TokenRows, sink: Sink) -> None:
        """Hands the gradients of the wanted states to ``sink``; those of parameters add up in ``parameter_gradients``,
        what this rank's tokens contribute. Collective over the tp, cp and pp groups."""
        pipeline = self._pipeline
        with pipeline.entered(_ignore, gradients=True) as taps, ExitStack() as stack:
            graphs: dict[int, Graph] = {}
            for stage in pipeline.stages:
                stack.enter_context(_frozen(stage.model.parameters()))
                graphs[stage.number] = stack.enter_context(self._kept(stage))
            for microbatch in microbatches:
                outputs = {}
                for stage in pipeline.stages:
                    outputs[stage.number] = self._forward(microbatch, stage, graphs[stage.number], tokens, taps)
                for stage in reversed(pipeline.stages):
                    self._backward(microbatch, stage, graphs[stage.number], outputs.pop(stage.number), sink)

    @contextmanager
    def _kept(self, stage: Stage) -> Iterator[Graph]:
        """Keeps states of this stage with their graphs; embeddings are the root on a stage that begins with them."""
        graph, points = Graph(), set(self._pipeline.points[stage.number])
        handles = []
        try:
            if stage.first and stage.model.pre_process:
                root = partial(_as_root, graph)
                # before the edits at the embedding, which the gradient has to go through
                handles.append(visit_site(stage.model, HookPoint(EMBED), root, prepend=True))
            for point in points:
                handles.append(visit_site(stage.model, point, partial(_keep, graph, point)))
            yield graph
        finally:
            for handle in handles:
                handle.remove()

    def _forward(
        self, microbatch: Microbatch, stage: Stage, graph: Graph, tokens: TokenRows, taps: dict[int, Taps]
    ) -> Tensor:
        graph.root, graph.states = None, {}
        received = None
        if not stage.first:
            work, received = self._pipeline.post_receive(microbatch, stage)
            wait_for_peer(work)
            received.requires_grad_()
            graph.root = received
        hidden = self._pipeline.forward(microbatch, stage, received, tokens, taps[stage.number])
        if not stage.last:
            wait_for_peer(self._pipeline.send(hidden, stage)[0])
        return hidden

    def _backward(self, microbatch: Microbatch, stage: Stage, graph: Graph, hidden: Tensor, sink: Sink) -> None:
        outcomes, gradients = [], []
        if not stage.last:
            outcomes.append(hidden)
            gradients.append(self._receive_gradient(hidden, stage))
        view = self._pipeline.view(microbatch)
        for point, state in graph.states.items():
            if point in self._seeds:
                outcomes.append(state)
                gradients.append(torch.zeros_like(state))
                lay_out(self._seeds[point], gradients[-1], view)
        assert graph.root is not None
        wanted = [point for point in self._wanted if point in graph.states]
        inputs = [graph.root, *(graph.states[point] for point in wanted), *self._parameters]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if outcomes:
            found = torch.autograd.grad(outcomes, inputs, gradients, allow_unused=True)
        if not stage.first:
            self._send_gradient(_or_zeros(found[0], graph.root), stage)
        for point, gradient in zip(wanted, found[1:], strict=False):
            if view.runs:
                gradient = _or_zeros(gradient, graph.states[point])
                rows = copy_rows(gradient, view.runs, first_index=view.first_index)
                sink(LocalSlice(hook_point=point, microbatch=microbatch.index, runs=view.runs, values=rows))
        for total, gradient in zip(self.parameter_gradients, found[1 + len(wanted) :], strict=True):
            if gradient is not None:
                total += gradient

    def _receive_gradient(self, hidden: Tensor, stage: Stage) -> Tensor:
        gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        group, rank = self._pipeline.link(stage.number)
        target = (rank + 1) % self._pipeline.groups.topology.pp
        work = dist.irecv(gradient, group=group, group_src=target)
        assert work is not None
        wait_for_peer(work)
        return gradient

    def _send_gradient(self, gradient: Tensor, stage: Stage) -> None:
        group, rank = self._pipeline.link(stage.number - 1)
        work = dist.isend(gradient.contiguous(), group=group, group_dst=rank)
        assert work is not None
        wait_for_peer(work)


def _as_root(graph: Graph, state: Tensor, _given: Tensor) -> Tensor:
    graph.root = state.detach().requires_grad_()
    return graph.root


def _keep(graph: Graph, point: HookPoint, state: Tensor, _given: Tensor) -> Tensor:
    graph.states[point] = state
    return state  # which is not always what the module gave: see adds_bias in sites.py


def _ignore(_piece: LocalSlice) -> None:
    """The states themselves are not wanted."""


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


@contextmanager
def _frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While entered, no parameter asks for its gradient."""
    asking = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
