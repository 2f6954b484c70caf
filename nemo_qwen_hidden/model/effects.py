"""What an edit does: logits, a few next tokens, gradients, of a batch of ragged sequences.

All of it is collective over all ranks, which all pass the same arguments, and gives the same on every layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from nemo_qwen_hidden.capture.backward import BackwardPass
from nemo_qwen_hidden.capture.edits import Edit
from nemo_qwen_hidden.capture.gather import SliceBuffer
from nemo_qwen_hidden.capture.pipeline import Pipeline
from nemo_qwen_hidden.capture.taps import Capture
from nemo_qwen_hidden.errors import ConfigError, status_of
from nemo_qwen_hidden.hookpoint import (
    FINAL_NORM,
    RESIDUAL_SITES,
    HookPoint,
    by_depth,
)
from nemo_qwen_hidden.model.batch import Batch, seeds_of
from nemo_qwen_hidden.model.calls import MOST_BYTES, WHOLE, BatchCalls, check_gather
from nemo_qwen_hidden.parallel.agree import on_rank_0

Metric = Callable[[Tensor], Tensor]
"""Logits [n, vocabulary] of the chosen tokens to a number, by operations that torch can differentiate."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """value: the metric; None where no metric was asked. states: gradients [batch, tokens, hidden] with respect to the
    state at each hook point as it goes on, after edits there; zero where there is padding. edits: for each edit, the
    gradients with respect to those of its tensors that require them."""

    value: float | None
    states: dict[HookPoint, Tensor]
    edits: list[list[Tensor]]


class EffectCalls(BatchCalls):
    """The calls of ``Qwen2HiddenModel`` that show effects."""

    def logits(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor | None = None,
        gather: Literal["rank0", "all"] = "rank0",
        lengths: Sequence[int] | Tensor | None = None,
        edits: Sequence[Edit] = (),
        batch_tokens: int = 4096,
        packing: bool = True,
    ) -> Tensor:
        """What the model says comes next, for chosen tokens alone. Needs ``from_pretrained(output_layer=True)``.

        Args:
            mask: bool [batch, tokens], the chosen tokens; None: the last of each sequence.
            gather, lengths, edits, batch_tokens, packing: as of ``hidden_states``.

        Returns:
            [n, vocabulary] in the compute dtype, tokens in order of sequence and position, on the ranks asked for;
            empty, [0, vocabulary], on the others. What tensor parallelism adds to the vocabulary is cut off.

        Raises:
            ConfigError: a model without its output layer, or arguments that do not fit each other.
        """
        self._require_output_layer()
        check_gather(gather, WHOLE)
        batch = self._token_batch(input_ids, lengths, batch_tokens, packing)
        return self._logits(batch, batch.last_tokens() if mask is None else mask, edits, gather)

    def generate(
        self,
        input_ids: Tensor,
        *,
        tokens: int,
        lengths: Sequence[int] | Tensor | None = None,
        edits: Sequence[Edit] = (),
        stop: Sequence[int] = (),
        batch_tokens: int = 4096,
        packing: bool = True,
    ) -> list[list[int]]:
        """The most likely next tokens, one after the other, so that an edit's effect can be seen.

        Each token runs the whole sequence again: meant for a few. An edit with a mask changes the tokens of the mask;
        one without changes the generated ones too.

        Args:
            tokens: how many, at the most. stop: token ids after which a sequence ends.
            lengths, edits, batch_tokens, packing: as of ``hidden_states``.

        Returns:
            The new tokens of each sequence, on every rank.
        """
        batch = self._token_batch(input_ids, lengths, batch_tokens, packing)
        found: list[list[int]] = [[] for _ in batch.lengths]
        running = list(range(len(found)))
        ragged = [input_ids[index, :length].tolist() for index, length in enumerate(batch.lengths)]
        for _ in range(tokens):
            whole = [[*prompt, *new] for prompt, new in zip(ragged, found, strict=True)]
            longest = max(map(len, whole))
            padded = torch.tensor([[*each, *[0] * (longest - len(each))] for each in whole])
            logits = self.logits(
                padded,
                lengths=[len(each) for each in whole],
                edits=edits,
                gather="all",
                batch_tokens=batch_tokens,
                packing=packing,
            )
            for index in running:
                found[index].append(int(logits[index].argmax()))
            running = [index for index in running if found[index][-1] not in stop]
            if not running:
                break
        return found

    def gradients(
        self,
        input_ids: Tensor,
        *,
        hook_points: str | Sequence[str] = (),
        metric: Metric | None = None,
        seeds: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
        gather: Literal["rank0", "all"] = "rank0",
        lengths: Sequence[int] | Tensor | None = None,
        edits: Sequence[Edit] = (),
        batch_tokens: int = 4096,
        packing: bool = True,
    ) -> Gradients:
        """Gradients of an outcome with respect to states and to tensors of edits, through all stages.

        Args:
            hook_points: residual sites whose gradients are wanted.
            metric: from the logits of the chosen tokens to a number; computed on rank 0.
            seeds: instead of ``metric``, {hook point: gradient of the outcome with respect to its state, [batch,
                tokens, hidden]}, at residual sites.
            mask: the tokens whose logits ``metric`` gets; None: the last of each sequence.
            gather, lengths, edits, batch_tokens, packing: as of ``hidden_states``.

        Raises:
            ConfigError: neither or both of metric and seeds, a hook point that is not at a residual site, seeds of
                another shape; on rank 0 a metric that gives no number. PeerError: on the others, when ``metric`` raises
                on rank 0.
        """
        if (metric is None) == (seeds is None):
            raise ConfigError("metric, seeds", "must be one of the two", "both" if metric else "neither")
        check_gather(gather, WHOLE)
        batch = self._token_batch(input_ids, lengths, batch_tokens, packing)
        value = None
        if metric is not None:
            self._require_output_layer()
            chosen = batch.last_tokens() if mask is None else mask
            value, upstream = self._metric(batch, chosen, edits, metric)
            seeds = {FINAL_NORM: upstream}
        sown = self._sown(seeds or {}, batch)
        wanted = self._points(hook_points) if len(hook_points) else ()
        for point in (*wanted, *sown):
            if point.site not in RESIDUAL_SITES:
                rule = f"must be at the residual sites {', '.join(RESIDUAL_SITES)}, for gradients"
                raise ConfigError("hook_points", rule, str(point))
        points = by_depth({*wanted, *sown}, self.config.num_layers)
        capture = Capture(points=points, edits=self._bound(batch, edits, points))
        pipeline = Pipeline(self.chunks, self.groups, stages=self.stages, capture=capture)
        backward = BackwardPass(pipeline, wanted=wanted, seeds=seeds_of(sown, batch))
        buffer = SliceBuffer()
        backward.run(self.of_this_replica(batch.microbatches), batch.rows, buffer)
        states = self._gathered(batch, Capture(points=wanted), buffer, gather, divisors=False) if wanted else {}
        return Gradients(value=value, states=states, edits=self._summed(edits, backward.parameter_gradients))

    def _sown(self, seeds: Mapping[str, Tensor], batch: Batch) -> dict[HookPoint, Tensor]:
        """Seeds by hook point, checked."""
        if not seeds:
            raise ConfigError("seeds", "must give a gradient at one hook point at least", {})
        shape = [len(batch.lengths), batch.tokens, self.config.hidden_size]
        found = {}
        for name, gradient in seeds.items():
            points = self._points(name, "seeds")
            if len(points) > 1:
                raise ConfigError("seeds", "must name one hook point for each gradient", name)
            if list(gradient.shape) != shape:
                raise ConfigError(
                    f"seeds[{name!r}]", f"must be of shape [batch, tokens, hidden], {shape}", list(gradient.shape)
                )
            found[points[0]] = gradient
        return found

    def _logits(self, batch: Batch, mask: Tensor, edits: Sequence[Edit], gather: str) -> Tensor:
        """[n, vocabulary] on the ranks asked for."""
        point = HookPoint(FINAL_NORM)
        wanted = self._wanted(batch, (point,), mask, None, edits, None, MOST_BYTES)
        kept = mask & (torch.arange(batch.tokens) < torch.tensor(batch.lengths)[:, None])
        states = self._states(batch, wanted, "all")[point][kept.to(self.groups.device)]
        topology, place = self.groups.topology, self.groups.place
        vocabulary = self._shape.vocab_size
        whole = states.new_empty(len(states), vocabulary)
        if place.pp == topology.pp - 1:
            part = linear(states, self._output_weight())
            parts = [torch.empty_like(part) for _ in range(topology.tp)]
            dist.all_gather(parts, part, group=self.groups.tp)
            whole = torch.cat(parts, dim=1)[:, :vocabulary].contiguous()
        source = topology.rank(tp=0, dp=0, pp=topology.pp - 1)
        dist.broadcast(whole, group=self.groups.world, group_src=source)
        return whole if gather == "all" or place.rank == 0 else whole[:0]

    def _metric(self, batch: Batch, mask: Tensor, edits: Sequence[Edit], metric: Metric) -> tuple[float, Tensor]:
        """The metric, and its gradient with respect to the final norm's output, [batch, tokens, hidden]."""
        logits = self._logits(batch, mask, edits, "all")
        groups, topology = self.groups, self.groups.topology
        upstream = torch.zeros_like(logits)
        # its failure reaches the others too, which would wait for it
        value = on_rank_0(lambda: _differentiate(metric, logits, upstream), groups, status_of=status_of)
        dist.broadcast(upstream, group=groups.world, group_src=0)
        back = logits.new_zeros(len(logits), self.config.hidden_size)
        if groups.place.pp == topology.pp - 1:
            weight = self._output_weight()
            columns = range(groups.place.tp * len(weight), (groups.place.tp + 1) * len(weight))
            mine = upstream[:, columns.start : columns.stop]
            back = mine @ weight[: mine.shape[1]]
            dist.all_reduce(back, group=groups.tp)
        gradient = logits.new_zeros(*mask.shape, self.config.hidden_size)
        kept = mask & (torch.arange(batch.tokens) < torch.tensor(batch.lengths)[:, None])
        gradient[kept.to(gradient.device)] = back
        return value, gradient

    def _output_weight(self) -> Tensor:
        """This tp rank's part of the output layer, [vocabulary / tp, hidden]; on the last pipeline stage."""
        chunk = self.chunks[-1]
        shared = chunk.share_embeddings_and_output_weights
        weight: Tensor = chunk.shared_embedding_or_output_weight() if shared else chunk.output_layer.weight
        return weight.detach()

    def _require_output_layer(self) -> None:
        if not self.config.output_layer:
            rule = "must have its output layer: from_pretrained(..., output_layer=True)"
            raise ConfigError("the model", rule, "built without it")

    def _summed(self, edits: Sequence[Edit], own: Sequence[Tensor]) -> list[list[Tensor]]:
        """Gradients of each edit's tensors, over all tokens; tp ranks that have the same tokens count once."""
        place = self.groups.place
        counts = place.topology.sp or place.tp == 0
        remaining = iter(own)
        found: list[list[Tensor]] = []
        for edit in edits:
            found.append([])
            for parameter in edit.parameters:
                if parameter.requires_grad:
                    total = next(remaining) * counts
                    dist.all_reduce(total, group=self.groups.world)
                    found[-1].append(total)
        return found


def _differentiate(metric: Metric, logits: Tensor, gradient: Tensor) -> float:
    """The metric of these logits; its gradient goes into ``gradient``, of the same shape."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        outcome = metric(leaf)
        if not isinstance(outcome, Tensor) or outcome.numel() != 1 or not outcome.requires_grad:
            rule = "must give one number, a tensor that torch has computed from the logits"
            shape = f"tensor of shape {list(outcome.shape)}" if isinstance(outcome, Tensor) else type(outcome).__name__
            raise ConfigError("metric", rule, shape)
        gradient.copy_(torch.autograd.grad(outcome, leaf)[0])
    return float(outcome.detach())
