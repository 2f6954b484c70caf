"""The forward-only pipeline: every stage runs its microbatches in the same order, with sends and receives in flight.

There is no schedule and no flush. A stage posts the receive of microbatch i+1 before it computes i, and lets up to
``SENDS_IN_FLIGHT`` sends be on the way, so that a stage waits only when its neighbour is slower over several
microbatches. Megatron's ``forward_backward_func`` is not used: it is made for losses, allocates on CUDA, and returns
nothing from the stages between.

S: tokens of the sequence axis, C: this rank's slice of it (S / tp under sequence parallelism), B: sequences, H: hidden.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_qwen_hidden.capture.taps import Sink, Taps, View, decoder_of_depth, tapped
from nemo_qwen_hidden.hookpoint import FINAL_NORM, HookPoint, deepest
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.parallel.host import megatron_on_host
from nemo_qwen_hidden.parallel.watch import wait_for_peer
from nemo_qwen_hidden.plan.microbatches import Microbatch
from nemo_qwen_hidden.plan.slices import stripe
from nemo_qwen_hidden.plan.stages import last_active_stage, points_of_stage

SENDS_IN_FLIGHT = 2

TokenRows = Callable[[int, int], Tensor]
"""(first row, length) to token ids, int64 [length]."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the model is called with: ids and positions [B, S] int64, and the document bounds of a packed sequence."""

    input_ids: Tensor
    position_ids: Tensor
    packed: PackedSeqParams | None


def make_inputs(microbatch: Microbatch, tokens: TokenRows, device: torch.device) -> Inputs:
    """Lays token ids and positions out as the microbatch says; padding is token 0 at position 0, on the right."""
    ids = torch.zeros(microbatch.sequences, microbatch.tokens, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    for segment, sequence, offset in microbatch.places():
        where = slice(offset, offset + segment.length)
        ids[sequence, where] = tokens(segment.first_row, segment.length)
        positions[sequence, where] = torch.arange(segment.length)
    packed = _packed(microbatch, device) if microbatch.packed else None
    return Inputs(input_ids=ids.to(device), position_ids=positions.to(device), packed=packed)


def _packed(microbatch: Microbatch, device: torch.device) -> PackedSeqParams:
    """Bounds of the segments; what pads the sequence at its end is a segment of its own."""
    lengths = [segment.length for segment in microbatch.segments]
    if microbatch.tokens > microbatch.rows:
        lengths.append(microbatch.tokens - microbatch.rows)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


class Pipeline:
    """One rank's part in running microbatches through all stages up to the deepest hook point.

    model: this rank's stage. stages: layer indices of every stage. Nothing deeper than the deepest hook point is
    computed; stages that lie wholly below it return at once.
    """

    def __init__(
        self, model: MCoreGPTModel, groups: ProcessGroups, *, stages: Sequence[range], points: Sequence[HookPoint]
    ) -> None:
        self._model, self._groups, self._config = model, groups, model.config
        self._stage = groups.place.pp
        depth = deepest(points, stages[-1].stop)
        self._points = points_of_stage(points, stages, self._stage)
        self._depth = depth
        self._last = last_active_stage(stages, depth)
        self._final_norm = any(point.site == FINAL_NORM for point in points)

    def run(
        self, microbatches: Iterable[Microbatch], tokens: TokenRows, sink: Sink, done: Callable[[Microbatch], None]
    ) -> None:
        """Runs ``microbatches``, the same on all stages of a replica. Collective over the pp group.

        sink: gets every ``LocalSlice`` of this rank. done: called after each microbatch of this stage.
        """
        if self._stage > self._last:
            return
        with ExitStack() as stack:
            stack.enter_context(megatron_on_host())
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(self._groups.device.type, enabled=False))
            stack.enter_context(_evaluating(self._model))
            stack.enter_context(decoder_of_depth(self._model, self._depth, final_norm=self._final_norm))
            taps = stack.enter_context(tapped(self._model, self._points, sink))
            sends: deque[tuple[dist.Work, Tensor]] = deque()
            for microbatch, received in self._receive(microbatches):
                hidden = self._forward(microbatch, received, tokens, taps)
                if self._stage < self._last:
                    sends.append(self._send(hidden))
                    while len(sends) > SENDS_IN_FLIGHT:
                        wait_for_peer(sends.popleft()[0])
                done(microbatch)
            for work, _ in sends:
                wait_for_peer(work)
            self._model.set_input_tensor(None)

    def _forward(self, microbatch: Microbatch, received: Tensor | None, tokens: TokenRows, taps: Taps) -> Tensor:
        inputs = make_inputs(microbatch, tokens, self._groups.device)
        if received is not None:
            self._model.set_input_tensor(received)
        taps.view = self._view(microbatch)
        try:
            hidden: Tensor = self._model(inputs.input_ids, inputs.position_ids, None, packed_seq_params=inputs.packed)
        finally:
            taps.view = None
        return hidden

    def _view(self, microbatch: Microbatch) -> View:
        place = self._groups.place
        owned = stripe(microbatch.tokens, part=place.tp, parts=place.topology.tp)
        return View(microbatch=microbatch, owned=owned, first_token=owned.start if place.topology.sp else 0)

    def _receive(self, microbatches: Iterable[Microbatch]) -> Iterator[tuple[Microbatch, Tensor | None]]:
        """Each microbatch with what the stage before sent for it; the next receive is posted before it is yielded."""
        if self._stage == 0:
            yield from ((microbatch, None) for microbatch in microbatches)
            return
        waiting: deque[tuple[Microbatch, dist.Work, Tensor]] = deque()
        for microbatch in microbatches:
            waiting.append((microbatch, *self._post_receive(microbatch)))
            if len(waiting) > 1:
                yield self._arrived(*waiting.popleft())
        while waiting:
            yield self._arrived(*waiting.popleft())

    def _post_receive(self, microbatch: Microbatch) -> tuple[dist.Work, Tensor]:
        topology = self._groups.topology
        local = microbatch.tokens // (topology.tp if topology.sp else 1)
        hidden_CBH = torch.empty(
            local,
            microbatch.sequences,
            self._config.hidden_size,
            dtype=self._config.params_dtype,
            device=self._groups.device,
        )
        return _work(dist.irecv(hidden_CBH, group=self._groups.pp, group_src=self._stage - 1)), hidden_CBH

    @staticmethod
    def _arrived(microbatch: Microbatch, work: dist.Work, hidden: Tensor) -> tuple[Microbatch, Tensor]:
        wait_for_peer(work)
        return microbatch, hidden

    def _send(self, hidden_CBH: Tensor) -> tuple[dist.Work, Tensor]:
        """The tensor has to live until the work is done."""
        sent = hidden_CBH.detach().contiguous()
        return _work(dist.isend(sent, group=self._groups.pp, group_dst=self._stage + 1)), sent


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
