"""The forward-only pipeline: every stage runs its microbatches in the same order, with sends and receives in flight.

There is no schedule and no flush. A stage posts the receive of microbatch i+1 before it computes i, and lets up to
``SENDS_IN_FLIGHT`` sends be on the way, so that a stage waits only when its neighbour is slower over several
microbatches. Megatron's ``forward_backward_func`` is not used: it is made for losses, allocates on CUDA, and returns
nothing from the stages between.

S: tokens of the sequence axis, C: this rank's slice of it (S / cp, under sequence parallelism S / cp / tp), B:
sequences, H: hidden.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_qwen_hidden.capture.rows import View, lay_out, view_of
from nemo_qwen_hidden.capture.taps import Capture, Sink, Taps, part_of_decoder, tapped
from nemo_qwen_hidden.hookpoint import FINAL_NORM, deepest
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.parallel.host import megatron_on_host
from nemo_qwen_hidden.parallel.watch import wait_for_peer
from nemo_qwen_hidden.plan.microbatches import Microbatch
from nemo_qwen_hidden.plan.stages import points_of_stage, stage_of, stage_of_layer
from nemo_qwen_hidden.trace.record import UNTRACED, Trace

SENDS_IN_FLIGHT = 2
ROUNDS_OF_A_TURN = 2

TokenRows = Callable[[int, int], Tensor]
"""(first row, length) to token ids, int64 [length]."""

StateRows = Callable[[int, int], Tensor]
"""(first row, length) to states [length, H]."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the model is called with: ids and positions [B, C] int64, and the document bounds of a packed sequence."""

    input_ids: Tensor
    position_ids: Tensor
    packed: PackedSeqParams | None


def make_inputs(microbatch: Microbatch, spans: Sequence[range], tokens: TokenRows, device: torch.device) -> Inputs:
    """Lays token ids and positions out as the microbatch says, and takes the part that lies on ``spans``; padding is
    token 0 at position 0, on the right."""
    ids = torch.zeros(microbatch.sequences, microbatch.tokens, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    for segment, sequence, offset in microbatch.places():
        where = slice(offset, offset + segment.length)
        ids[sequence, where] = tokens(segment.first_row, segment.length)
        positions[sequence, where] = torch.arange(segment.length)
    if len(spans) > 1:
        ids, positions = (torch.cat([each[:, s.start : s.stop] for s in spans], dim=1) for each in (ids, positions))
    packed = _packed(microbatch, device) if microbatch.packed else None
    return Inputs(input_ids=ids.to(device), position_ids=positions.to(device), packed=packed)


def _packed(microbatch: Microbatch, device: torch.device) -> PackedSeqParams:
    """Bounds of the segments, over the whole sequence axis; what pads it at its end is a segment of its own."""
    lengths = microbatch.bounds()
    longest = max(stop - start for start, stop in pairwise(lengths))
    bounds = torch.tensor(lengths).to(device=device, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pipeline that this rank holds: its number, its part of the model, whether it is the first or the
    last that runs."""

    number: int
    model: MCoreGPTModel
    first: bool
    last: bool


class Pipeline:
    """One rank's part in running microbatches through all stages up to the deepest hook point.

    chunks: the parts of the model that this rank holds, one, or one for each virtual stage. stages: layer indices of
    every stage. start: the layer that runs first, on given states; None: the model's beginning. Nothing deeper than the
    deepest hook point is computed; stages that lie wholly outside have nothing to do. trace: is told of forwards, taps
    and waits.
    """

    def __init__(
        self,
        chunks: Sequence[MCoreGPTModel],
        groups: ProcessGroups,
        *,
        stages: Sequence[range],
        capture: Capture,
        start: int | None = None,
        trace: Trace = UNTRACED,
    ) -> None:
        self.groups, self.capture, self._config, self._trace = groups, capture, chunks[0].config, trace
        points = capture.points
        self._layers = range(start or 0, deepest(points, stages[-1].stop))
        self._final_norm = any(point.site == FINAL_NORM for point in points)
        first = 0 if start is None else stage_of_layer(start, stages)
        last = max(stage_of(point, stages) for point in points)
        self.stages = [
            Stage(number=number, model=chunk, first=number == first, last=number == last)
            for number, chunk in zip(groups.place.stages, chunks, strict=True)
            if first <= number <= last
        ]
        self.points = {stage.number: points_of_stage(points, stages, stage.number) for stage in self.stages}
        places = [(edit, stage_of(edit.edit.hook_point, stages)) for edit in capture.edits]
        self._edits = {s.number: [edit for edit, place in places if place == s.number] for s in self.stages}

    def run(
        self,
        microbatches: Iterable[Microbatch],
        tokens: TokenRows,
        sink: Sink,
        done: Callable[[Microbatch], None],
        states: StateRows | None = None,
    ) -> None:
        """Runs ``microbatches``, the same on all stages of a replica. Collective over the tp, cp and pp groups.

        sink: gets every ``LocalSlice`` of this rank. done: called after the last of this rank's stages of each
        microbatch. states: (first row, length) to the states [length, H] that the first layer is given, where the
        pipeline has a ``start``.
        """
        if not self.stages:
            return
        with self.entered(sink) as taps:
            sends: deque[tuple[dist.Work, Tensor]] = deque()
            for microbatch, stage, received in self._receive(self._order(microbatches)):
                if stage.first and states is not None:
                    received = self._given_states(microbatch, states)
                hidden = self.forward(microbatch, stage, received, tokens, taps[stage.number])
                if not stage.last:
                    sends.append(self.send(hidden, stage))
                    while len(sends) > SENDS_IN_FLIGHT:
                        self._wait("send", sends.popleft()[0])
                if stage is self.stages[-1]:
                    done(microbatch)
            for work, _ in sends:
                self._wait("send", work)

    def _wait(self, span: str, work: dist.Work, **args: int) -> None:
        with self._trace.span(span, **args):
            wait_for_peer(work)

    @contextmanager
    def entered(self, sink: Sink, *, gradients: bool = False) -> Iterator[dict[int, Taps]]:
        """While entered, this rank's chunks are as they have to be to run; the taps on them, by number of the stage."""
        with ExitStack() as stack:
            stack.enter_context(megatron_on_host())
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(torch.autocast(self.groups.device.type, enabled=False))
            taps = {}
            for stage in self.stages:
                stack.enter_context(_evaluating(stage.model))
                stack.enter_context(part_of_decoder(stage.model, self._layers, final_norm=self._final_norm))
                points, edits = self.points[stage.number], self._edits[stage.number]
                taps[stage.number] = stack.enter_context(
                    tapped(stage.model, self.capture, points, edits, self.groups, sink, self._trace)
                )
            try:
                yield taps
            finally:
                for stage in self.stages:
                    stage.model.set_input_tensor(None)

    def _order(self, microbatches: Iterable[Microbatch]) -> Iterator[tuple[Microbatch, Stage]]:
        """What this rank runs, in the order that all pipeline ranks share. With virtual stages several microbatches go
        through one stage before the rank turns to its next. Of pp the first would be back just then, if none took
        longer than another; of twice as many it is back in time when some do."""
        at_once = 1 if len(self.stages) == 1 else ROUNDS_OF_A_TURN * self.groups.topology.pp
        stream = iter(microbatches)
        while group := list(islice(stream, at_once)):
            for stage in self.stages:
                for microbatch in group:
                    yield microbatch, stage

    def forward(
        self, microbatch: Microbatch, stage: Stage, received: Tensor | None, tokens: TokenRows, taps: Taps
    ) -> Tensor:
        """What a stage gives for a microbatch, [C, B, H]; ``received`` is what the stage before gave."""
        view = self.view(microbatch)
        inputs = make_inputs(microbatch, view.spans, tokens, self.groups.device)
        model, given = stage.model, None
        if received is not None and model.pre_process:
            given = received
        elif received is not None:
            model.set_input_tensor(received)
        taps.view = view
        try:
            with self._trace.span("forward", microbatch=microbatch.index, stage=stage.number, tokens=microbatch.rows):
                hidden: Tensor = model(
                    inputs.input_ids, inputs.position_ids, None, decoder_input=given, packed_seq_params=inputs.packed
                )
            with self._trace.span("exchange", microbatch=microbatch.index, stage=stage.number):
                taps.settle()
        finally:
            taps.view = None
        return hidden

    def view(self, microbatch: Microbatch) -> View:
        """What this rank has of a microbatch, and what is kept of it."""
        place = self.groups.place
        return view_of(microbatch, place.topology, cp=place.cp, tp=place.tp, choice=self.capture.choice)

    def _given_states(self, microbatch: Microbatch, states: StateRows) -> Tensor:
        """The states of this rank's tokens, [C, B, H]; zero where there is padding."""
        given = torch.zeros(self._shape(microbatch), dtype=self._config.params_dtype, device=self.groups.device)
        lay_out(states, given, self.view(microbatch))
        return given

    def _receive(self, order: Iterable[tuple[Microbatch, Stage]]) -> Iterator[tuple[Microbatch, Stage, Tensor | None]]:
        """Each step with what the stage before sent for it; the next receive is posted before a step is yielded."""
        waiting: deque[tuple[Microbatch, Stage, tuple[dist.Work, Tensor] | None]] = deque()
        for microbatch, stage in order:
            waiting.append((microbatch, stage, None if stage.first else self.post_receive(microbatch, stage)))
            if len(waiting) > 1:
                yield self._arrived(*waiting.popleft())
        while waiting:
            yield self._arrived(*waiting.popleft())

    def post_receive(self, microbatch: Microbatch, stage: Stage) -> tuple[dist.Work, Tensor]:
        """Begins to receive what the stage before sends: [C, B, H], there when the work is done."""
        hidden_CBH = torch.empty(self._shape(microbatch), dtype=self._config.params_dtype, device=self.groups.device)
        group, source = self.link(stage.number - 1)
        return _work(dist.irecv(hidden_CBH, group=group, group_src=source)), hidden_CBH

    def _shape(self, microbatch: Microbatch) -> tuple[int, int, int]:
        """[C, B, H] of what goes from stage to stage."""
        topology = self.groups.topology
        local = microbatch.tokens // (topology.cp * (topology.tp if topology.sp else 1))
        return local, microbatch.sequences, self._config.hidden_size

    def link(self, stage: int) -> tuple[dist.ProcessGroup, int]:
        """The group over which a stage sends to the next, and the pipeline rank of the stage. Between the last and the
        first pipeline rank it is another, since NCCL keeps the order of what one pair of ranks exchanges in a group."""
        rank = stage % self.groups.topology.pp
        wraps = rank == self.groups.topology.pp - 1
        return (self.groups.pp_wrap if wraps else self.groups.pp), rank

    def _arrived(
        self, microbatch: Microbatch, stage: Stage, receive: tuple[dist.Work, Tensor] | None
    ) -> tuple[Microbatch, Stage, Tensor | None]:
        if receive is None:
            return microbatch, stage, None
        self._wait("receive", receive[0], microbatch=microbatch.index, stage=stage.number)
        return microbatch, stage, receive[1]

    def send(self, hidden_CBH: Tensor, stage: Stage) -> tuple[dist.Work, Tensor]:
        """Begins to send to the next stage. The tensor has to live until the work is done."""
        sent = hidden_CBH.detach().contiguous()
        group, rank = self.link(stage.number)
        target = (rank + 1) % self.groups.topology.pp
        return _work(dist.isend(sent, group=group, group_dst=target)), sent


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the pp group that it sends in"
    return work


@contextmanager
def _evaluating(model: MCoreGPTModel) -> Iterator[None]:
    """Evaluation mode while entered; puts each module's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
