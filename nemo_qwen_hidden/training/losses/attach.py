"""Losses on states, attached to the states in the forward pass of Megatron's schedules.

A schedule takes one loss, from the last stage. A loss on a state of another stage is attached to the state instead: an
autograd function passes the state on, with the same bits, and when its gradient comes back, starts the loss's own
(Megatron-Core does so for the auxiliary losses of its experts, ``MoEAuxLossAutoScaler`` in
``transformer/moe/moe_utils.py``, but has one scale for all, which its schedule sets for models with experts alone).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_qwen_hidden.capture.sites import has_site, visit_site
from nemo_qwen_hidden.errors import ConfigError, HiddenStatesError
from nemo_qwen_hidden.hookpoint import EMBED, HookPoint
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.training.losses.state_loss import Batch, StateLoss, Tokens

MASK = "loss_mask"


@dataclass
class _Count:
    """Of one loss in one step. computed, started: microbatches whose value was computed, and whose gradient was
    started. totals: fp32, this rank's parts of the loss and of what else it measures, each times what its microbatch
    weighs; weight: the sum of what they weigh."""

    totals: Tensor
    weight: float = 0.0
    computed: int = 0
    started: int = 0

    def start(self) -> None:
        self.started += 1


class AttachedLosses:
    """Losses on the states of this rank's chunks, until it is closed.

    Around each call of a schedule ``begin_step`` and ``end_step``, and in the forward step, right before the model is
    called, ``begin_microbatch``; ``StateLossCallback`` does so in NeMo's Trainer. What is added to the gradient of a
    step: of each loss its weight times the mean over the microbatches of all replicas, as Megatron averages the main
    loss; where the model's configuration says ``calculate_per_token_loss``, each microbatch weighs what it has of
    ``loss_mask``. A loss is computed where a graph of its state is kept: in the forward pass, or where the layer is
    recomputed, then.

    Raises:
        ConfigError: two losses of one name, or one at no residual site.
        HiddenStatesError: the decoder runs from CUDA graphs, which bypass hooks, or recomputes layers in 8 or 4 bits,
            which Transformer Engine does in a way of its own.
    """

    def __init__(self, chunks: Sequence[MCoreGPTModel], losses: Sequence[StateLoss], groups: ProcessGroups) -> None:
        self._losses, self._groups = tuple(losses), groups
        names = [loss.name for loss in losses]
        if len(set(names)) < len(names):
            raise ConfigError("names of losses on states", "must differ", names)
        config = chunks[0].config
        _require_support(config)
        self._config: TransformerConfig = config
        self._points = {loss.name: loss.point(config.num_layers) for loss in losses}
        self._here = {name: [c for c in chunks if has_site(c, point)] for name, point in self._points.items()}
        self._counts: dict[str, _Count] = {}
        self._open, self._forward_only, self._microbatches = False, True, 0
        self._next: Batch | None = None
        self._batch: Batch | None = None
        self._handles: list[RemovableHandle] = []
        for chunk in chunks:
            self._handles.append(chunk.register_forward_pre_hook(self._enter, with_kwargs=True))
            here = [loss for loss in losses if chunk in self._here[loss.name]]
            for loss in here:
                visit = partial(self._visit, loss, _head_of(chunk, loss))
                self._handles.append(visit_site(chunk, self._points[loss.name], visit))
            if here and chunk.pre_process and config.recompute_granularity is not None:
                self._handles.append(visit_site(chunk, HookPoint(EMBED), self._differentiate))
            self._handles.append(chunk.register_forward_hook(self._leave))

    def __enter__(self) -> "AttachedLosses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin_step(self, *, num_microbatches: int, forward_only: bool = False) -> None:
        """Before a schedule runs so many microbatches."""
        self._open, self._forward_only, self._microbatches = True, forward_only, num_microbatches
        self._next = self._batch = None
        self._counts = {
            loss.name: _Count(torch.zeros(1 + len(loss.measured), device=self._groups.device))
            for loss in self._losses
            if self._here[loss.name]
        }

    def begin_microbatch(self, batch: Batch) -> None:
        """Before the model is called on ``batch``: all of it, with every token of it, on every rank that computes a
        part of it, on every stage.

        Raises:
            ConfigError: its sequences are packed.
        """
        require_padded(batch)
        self._next = batch

    def end_step(self) -> dict[str, float]:
        """The mean of each loss over the microbatches of all replicas, the same on every rank, 0 where none weighs
        anything; of a forward pass alone also what losses measure, as ``NAME_MEASURE``. Collective over all ranks.

        Raises:
            HiddenStatesError: on every rank, a loss was not computed, or its gradient was not started, exactly once for
                each microbatch.
        """
        self._open, self._next, self._batch = False, None, None
        topology = self._groups.topology
        most = 1 + max((len(loss.measured) for loss in self._losses), default=0)
        sums = torch.zeros(len(self._losses), 2 + most, dtype=torch.float64, device=self._groups.device)
        for number, loss in enumerate(self._losses):
            count = self._counts.get(loss.name)
            if count is not None:
                copies = topology.tp if loss.every_tp_rank_has_all or not topology.sp else 1
                sums[number, 0] = float(not self._complete(count))
                sums[number, 1] = count.weight / (topology.tp * topology.cp)
                sums[number, 2 : 2 + len(count.totals)] = count.totals.double() / copies
        dist.all_reduce(sums, group=self._groups.world)
        values: dict[str, float] = {}
        for loss, (incomplete, weight, *totals) in zip(self._losses, sums.tolist(), strict=True):
            if incomplete:
                raise HiddenStatesError(self._why(loss.name))
            names = [loss.name, *(f"{loss.name}_{each}" for each in loss.measured if self._forward_only)]
            values |= {name: total / (weight or 1.0) for name, total in zip(names, totals, strict=False)}
        return values

    def _enter(self, _chunk: nn.Module, _inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._open:
            if self._next is None:
                raise HiddenStatesError("begin_microbatch() must be called before each call of the model in a step")
            if named.get("packed_seq_params") is not None:
                raise _packed("packed_seq_params")
            self._batch, self._next = self._next, None

    def _differentiate(self, state: Tensor, _given: Tensor) -> Tensor | None:
        """Where all before it is frozen, no gradient of what goes into a layer is asked for, and then PyTorch never
        recomputes the layer. On the first stage alone: what a stage receives always has one."""
        graph = self._open and not self._forward_only
        return None if state.requires_grad or not graph else state.detach().requires_grad_()

    def _leave(self, _chunk: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A layer that is recomputed is so when the schedule has gone on to later microbatches: the gradient of a
        chunk's output, which comes first, says whose backward pass begins."""
        batch, self._batch = self._batch, None
        if not self._open or self._forward_only or not output.requires_grad:
            return None
        return _passed_on(_Announce, output, partial(setattr, self, "_batch", batch))

    def _visit(self, loss: StateLoss, head: nn.Module | None, state_CBH: Tensor, _given: Tensor) -> Tensor | None:
        """Nothing in the first of two passes through a recomputed layer, which keeps no graph."""
        if not self._open or not (self._forward_only or torch.is_grad_enabled()):
            return None
        batch = self._batch
        if batch is None:
            raise HiddenStatesError(f"loss {loss.name} cannot tell which microbatch its state is of")
        tokens = Tokens.at(self._points[loss.name], self._groups.place, batch)
        if state_CBH.shape[:2] != (len(tokens.positions), len(batch["tokens"])):
            rule = f"must be whole, and what this rank has of it [tokens, sequences] {list(state_CBH.shape[:2])}"
            raise ConfigError("batch", rule, [len(tokens.positions), len(batch["tokens"])])
        graph = torch.is_grad_enabled() and not self._forward_only
        with torch.set_grad_enabled(graph), torch.autocast(state_CBH.device.type, enabled=False):
            part = loss.part(state_CBH, tokens, head)
            measures = loss.measures(state_CBH, tokens, head) if self._forward_only else {}
        count, weighs = self._counts[loss.name], self._weighs(batch)
        parts = [part.detach(), *(measures.get(name, torch.zeros_like(part)).to(part) for name in loss.measured)]
        count.totals += torch.stack(parts).detach() * weighs
        count.weight += weighs
        count.computed += 1
        if not graph:
            return None
        return _passed_on(_Start, state_CBH, part * (loss.weight * weighs * self._scale(part)), count.start)

    def _weighs(self, batch: Batch) -> float:
        """What a microbatch weighs in a step."""
        if not self._config.calculate_per_token_loss:
            return 1.0
        if MASK not in batch:
            raise ConfigError("batch", f"must have `{MASK}` where calculate_per_token_loss is on", sorted(batch))
        return float(batch[MASK].sum())

    def _scale(self, like: Tensor) -> Tensor:
        """What Megatron does to the main loss before its backward pass, or leaves to be undone: it averages the
        gradients of dp and cp ranks, or divides their sum by the number of tokens (``calculate_per_token_loss``), and
        divides by the optimizer's scale. ``pipeline_parallel/schedules.py: forward_step_calc_loss`` of 0.16.1."""
        scale = torch.ones(1, device=like.device)
        if self._config.grad_scale_func is not None:
            scale = self._config.grad_scale_func(scale)
        if not self._config.calculate_per_token_loss:
            scale = scale * (self._groups.topology.cp / self._microbatches)
        return scale.to(like.device)[0]

    def _complete(self, count: _Count) -> bool:
        started = 0 if self._forward_only else self._microbatches
        return (count.computed, count.started) == (self._microbatches, started)

    def _why(self, name: str) -> str:
        count = self._counts.get(name)
        seen = f"computed {count.computed} times and started {count.started}" if count else "not, on another rank"
        return (
            f"loss {name} must be computed, and its gradient started, once for each of {self._microbatches} "
            f"microbatches, but was {seen}: the main loss must depend on {self._points[name]}, and no layer may be "
            "skipped"
        )


def require_padded(batch: Batch) -> None:
    """Refuses packed sequences.

    Raises:
        ConfigError: the batch has some.
    """
    if "cu_seqlens" in batch:
        raise _packed("cu_seqlens")


def _packed(sign: str) -> ConfigError:
    return ConfigError("batch", "must be padded where losses are on states", f"packed ({sign})")


class _Start(torch.autograd.Function):
    """The state as it is; with its gradient comes that of the loss."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, loss: Tensor, started: Callable[[], None]) -> Tensor:
        ctx.one, ctx.started = torch.ones_like(loss), started
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.started()
        return gradients[0], ctx.one, None


class _Announce(torch.autograd.Function):
    """The output as it is; with its gradient comes a call."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.call()
        return gradients[0], None


def _passed_on(function: type[torch.autograd.Function], state: Tensor, *arguments: Any) -> Tensor:
    """Not a view: the schedule frees a stage's output in place once it was sent, and refuses to of views
    (``deallocate_output_tensor``)."""
    given: Any = function.apply(state, *arguments)
    passed: Tensor = make_viewless_tensor(given, requires_grad=given.requires_grad, keep_graph=True)
    return passed


def _head_of(chunk: MCoreGPTModel, loss: StateLoss) -> nn.Module | None:
    heads = getattr(chunk, "state_heads", None)
    return None if heads is None else getattr(heads, loss.name, None)


def _require_support(config: TransformerConfig) -> None:
    if getattr(config, "enable_cuda_graph", False) or getattr(config, "cuda_graph_impl", "none") != "none":
        raise HiddenStatesError("losses cannot be attached to states in CUDA graphs, which bypass hooks: turn them off")
    narrow = config.fp8 or getattr(config, "fp4", None)
    if narrow and config.recompute_granularity == "full":
        rule = "must not be full in fp8 or fp4 where losses are on states: Transformer Engine recomputes in its own way"
        raise ConfigError("recompute_granularity", rule, "full")
