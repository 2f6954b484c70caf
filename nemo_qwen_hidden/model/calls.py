"""What a model does with a batch of ragged sequences: hidden states, parts of the model, logits, gradients, tokens.

All of it is collective over all ranks, which all pass the same arguments, and gives the same on every layout.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor
from torch.nn.functional import linear

from nemo_qwen_hidden.capture.attention import AttentionWeights
from nemo_qwen_hidden.capture.backward import BackwardPass
from nemo_qwen_hidden.capture.choose import choice_of
from nemo_qwen_hidden.capture.edits import BoundEdit, Edit
from nemo_qwen_hidden.capture.gather import LocalStates, SliceBuffer, gather_slices, holdings
from nemo_qwen_hidden.capture.pipeline import Pipeline
from nemo_qwen_hidden.capture.taps import Capture, LocalSlice
from nemo_qwen_hidden.checkpoint.architecture import Architecture
from nemo_qwen_hidden.errors import ConfigError, status_of
from nemo_qwen_hidden.hookpoint import (
    ATTN_WEIGHTS,
    EMBED,
    FINAL_NORM,
    RESID_POST,
    RESIDUAL_SITES,
    HookPoint,
    by_depth,
    expand,
)
from nemo_qwen_hidden.model.batch import Batch, check_token_ids, seeds_of
from nemo_qwen_hidden.parallel.agree import on_rank_0
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.plan.microbatches import Microbatch, replica_of
from nemo_qwen_hidden.plan.shapes import state_shape

Gather = Literal["rank0", "all", "none"]
WHOLE = ("rank0", "all")
GATHER = (*WHOLE, "none")
MOST_BYTES = 2**30
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


class Options(TypedDict, total=False):
    """Keywords of ``hidden_states``."""

    lengths: Sequence[int] | Tensor | None
    mask: Tensor | None
    pool: str | None
    edits: Sequence[Edit]
    heads: Sequence[int] | None
    most_bytes: int
    batch_tokens: int
    packing: bool


class BatchCalls:
    """The calls of ``Qwen2HiddenModel`` on a batch."""

    config: Any
    architecture: Architecture | None

    @property
    @abstractmethod
    def groups(self) -> ProcessGroups:
        """Where this rank stands."""

    @property
    @abstractmethod
    def chunks(self) -> list[MCoreGPTModel]:
        """This rank's parts of the model."""

    @property
    @abstractmethod
    def stages(self) -> tuple[range, ...]:
        """Layer indices of every pipeline stage."""

    @overload
    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        hook_points: str | Sequence[str],
        gather: Literal["none"],
        **options: Unpack[Options],
    ) -> dict[HookPoint, LocalStates]: ...

    @overload
    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        hook_points: str | Sequence[str],
        gather: Literal["rank0", "all"] = ...,
        **options: Unpack[Options],
    ) -> dict[HookPoint, Tensor]: ...

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        hook_points: str | Sequence[str],
        gather: Gather = "rank0",
        lengths: Sequence[int] | Tensor | None = None,
        mask: Tensor | None = None,
        pool: str | None = None,
        edits: Sequence[Edit] = (),
        heads: Sequence[int] | None = None,
        most_bytes: int = MOST_BYTES,
        batch_tokens: int = 4096,
        packing: bool = True,
    ) -> dict[HookPoint, Tensor] | dict[HookPoint, LocalStates]:
        """Hidden states of a batch of ragged sequences. Collective over all ranks, which all pass the same arguments.

        Args:
            input_ids: [batch, tokens] integers, padded on the right; what the padding is does not matter.
            hook_points: such as ``["embed", "resid_post@12", "z@0:24:6", "final_norm"]`` or ``"all"``.
            gather: who gets the whole: ``rank0``, ``all`` ranks, or ``none``: each rank keeps what it holds.
            lengths: tokens of each sequence; None where none is padded.
            mask: bool [batch, tokens], the tokens whose states are wanted; no others are copied. None: all.
            pool: ``last``, ``mean`` or ``weighted_mean`` (see docs/tokens.md): one state for each sequence, over the
                tokens of ``mask``. Sums are in fp32.
            edits: what is changed on the way, see ``capture.edits``.
            heads: attention heads whose ``attn_weights`` are wanted, ascending; None: all.
            most_bytes: refuse ``attn_weights`` that would take more, since they grow with the square of the tokens.
            batch_tokens, packing: how the batch is cut into microbatches; the result does not depend on them.

        Returns:
            {HookPoint: [batch, tokens, *shape]} in the compute dtype, zero where nothing was kept, on the ranks asked
            for and {} on the others; ``shape`` is [hidden], [heads, head_dim], ... (``plan.shapes.state_shape``, with
            as many keys as there are tokens). With ``pool`` [batch, *shape]. With ``none`` {HookPoint: LocalStates} of
            those hook points of which this rank holds a state, rows not reshaped.

        Raises:
            ConfigError: a hook point that the model lacks, or arguments that do not fit each other.
        """
        batch = self._token_batch(input_ids, lengths, batch_tokens, packing)
        wanted = self._wanted(batch, self._points(hook_points), mask, pool, edits, heads, most_bytes)
        return self._states(batch, wanted, gather)

    def run(
        self,
        states: Tensor,
        *,
        start: int,
        stop: int,
        hook_points: str | Sequence[str] | None = None,
        gather: Literal["rank0", "all"] = "rank0",
        lengths: Sequence[int] | Tensor | None = None,
        edits: Sequence[Edit] = (),
        most_bytes: int = MOST_BYTES,
        batch_tokens: int = 4096,
        packing: bool = True,
    ) -> dict[HookPoint, Tensor]:
        """Runs layers ``start`` to ``stop - 1`` on given states, such as those of a store.

        Args:
            states: [batch, tokens, hidden], the residual stream before layer ``start``, padded on the right: what a
                store holds as ``resid_post@(start - 1)``. All ranks pass the same.
            hook_points: what is wanted, within these layers; ``final_norm`` where ``stop`` is the number of layers.
                None: the residual stream after them.
            gather, lengths, edits, most_bytes, batch_tokens, packing: as of ``hidden_states``.

        Returns:
            {HookPoint: [batch, tokens, *shape]}, as ``hidden_states``.

        Raises:
            ConfigError: layers that the model lacks, or hook points outside of them.
        """
        layers = self.config.num_layers
        if not 0 <= start < stop <= layers:
            rule = f"must be layers of the model, 0 <= start < stop <= {layers}"
            raise ConfigError("start, stop", rule, f"{start}, {stop}")
        if states.ndim != 3 or states.shape[2] != self.config.hidden_size:
            rule = f"must be of shape [batch, tokens, {self.config.hidden_size}]"
            raise ConfigError("states", rule, list(states.shape))
        points = self._points(f"{RESID_POST}@{stop - 1}" if hook_points is None else hook_points)
        for point in (*points, *(edit.hook_point for edit in edits)):
            after = stop == layers and point.site == FINAL_NORM
            if point.site == EMBED or not (after or (point.layer is not None and start <= point.layer < stop)):
                raise ConfigError("hook_points", f"must lie within layers {start} to {stop - 1}", str(point))
        batch = Batch(states, lengths, self.groups.topology, batch_tokens=batch_tokens, packing=packing)
        wanted = self._wanted(batch, points, None, None, edits, None, most_bytes)
        return self._states(batch, wanted, gather, start=start)

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
        _check_gather(gather, WHOLE)
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
        _check_gather(gather, WHOLE)
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

    def of_this_replica(self, microbatches: Iterable[Microbatch]) -> Iterator[Microbatch]:
        """Those that this data-parallel replica runs."""
        place = self.groups.place
        return (each for each in microbatches if replica_of(each, place.topology.dp) == place.dp)

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

    def _token_batch(
        self, input_ids: Tensor, lengths: Sequence[int] | Tensor | None, batch_tokens: int, packing: bool
    ) -> Batch:
        if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.numel() == 0:
            raise ConfigError("input_ids", "must be integers of shape [batch, tokens]", list(input_ids.shape))
        batch = Batch(input_ids, lengths, self.groups.topology, batch_tokens=batch_tokens, packing=packing)
        check_token_ids(input_ids, batch.lengths, self._shape.vocab_size)
        if self.architecture is not None:
            self.architecture.require_length(max(batch.lengths), "input_ids")
        return batch

    def _points(self, hook_points: str | Sequence[str], setting: str = "hook_points") -> tuple[HookPoint, ...]:
        points = expand(hook_points, num_layers=self.config.num_layers, setting=setting)
        if not self.config.final_norm and any(point.normed for point in points):
            raise ConfigError(setting, "must leave out `final_norm`: this model was built without it", hook_points)
        return points

    def _wanted(
        self,
        batch: Batch,
        points: tuple[HookPoint, ...],
        mask: Tensor | None,
        pool: str | None,
        edits: Sequence[Edit],
        heads: Sequence[int] | None,
        most_bytes: int,
    ) -> Capture:
        """What is captured of a batch, the arguments checked."""
        count = self._shape.num_heads
        asked = tuple(range(count) if heads is None else heads)
        if not asked or list(asked) != [head for head in range(count) if head in asked]:
            raise ConfigError("heads", f"must name attention heads from 0 to {count - 1}, ascending, each once", heads)
        wanted = Capture(
            points=points,
            edits=self._bound(batch, edits, points),
            choice=choice_of(batch.lengths, mask, pool, tokens=batch.tokens),
            attention=AttentionWeights(heads=asked, num_heads=count, keys=batch.tokens),
        )
        if wanted.pools and any(point.site == ATTN_WEIGHTS for point in points):
            raise ConfigError("pool", "must be None for attn_weights, whose keys differ from token to token", pool)
        size = self._attention_bytes(batch, wanted)
        if size > most_bytes:
            rule = f"must take at most `most_bytes` ({most_bytes:,}) for attn_weights: ask for fewer heads or tokens"
            raise ConfigError("hook_points", f"{rule}, or allow more", f"{size:,} bytes")
        return wanted

    def _bound(self, batch: Batch, edits: Sequence[Edit], points: Sequence[HookPoint]) -> tuple[BoundEdit, ...]:
        """Edits of a batch of which ``points`` are wanted. What lies behind them is not run; that is said here, on
        every rank, since hooks would find out on one alone."""
        for edit in edits:
            if by_depth({edit.hook_point, *points}, self.config.num_layers)[-1] not in points:
                rule = "must not lie behind the deepest state that is asked for, where nothing would change"
                raise ConfigError("hook point of an edit", rule, str(edit.hook_point))
        return batch.bound(edits, self.config.hidden_size)

    def _attention_bytes(self, batch: Batch, wanted: Capture) -> int:
        layers = sum(point.site == ATTN_WEIGHTS for point in wanted.points)
        rows, kept = sum(batch.lengths), None if wanted.choice is None else wanted.choice.kept
        if kept is not None:
            starts = accumulate(batch.lengths, initial=0)
            rows = sum(len(kept(start, length) or ()) for start, length in zip(starts, batch.lengths, strict=False))
        size: int = self.config.params_dtype.itemsize
        return layers * rows * len(wanted.attention.heads) * wanted.attention.keys * size

    @overload
    def _states(
        self, batch: Batch, wanted: Capture, gather: Literal["rank0", "all"], *, start: int | None = None
    ) -> dict[HookPoint, Tensor]: ...

    @overload
    def _states(
        self, batch: Batch, wanted: Capture, gather: Gather, *, start: int | None = None
    ) -> dict[HookPoint, Tensor] | dict[HookPoint, LocalStates]: ...

    def _states(
        self, batch: Batch, wanted: Capture, gather: Gather, *, start: int | None = None
    ) -> dict[HookPoint, Tensor] | dict[HookPoint, LocalStates]:
        """Runs a batch, of token ids or, from layer ``start`` on, of states."""
        _check_gather(gather, GATHER)
        buffer = SliceBuffer()
        pipeline = Pipeline(self.chunks, self.groups, stages=self.stages, capture=wanted, start=start)
        mine = self.of_this_replica(batch.microbatches)
        pipeline.run(mine, batch.rows if start is None else _no_tokens, buffer, _ignore, _given(batch, start))
        if gather == "none":
            held = {point: buffer.of(point) for point in wanted.points}
            return batch.assembler.local({point: kept for point, kept in held.items() if kept}, self._like)
        return self._gathered(batch, wanted, buffer, gather)

    def _gathered(
        self,
        batch: Batch,
        wanted: Capture,
        buffer: SliceBuffer,
        gather: Literal["rank0", "all"],
        *,
        divisors: bool = True,
    ) -> dict[HookPoint, Tensor]:
        """The states of a batch out of what each rank holds."""
        asked = wanted.attention
        shapes = {p: state_shape(p, self._shape, keys=asked.keys, heads=asked.heads) for p in wanted.points}
        widths = {point: prod(shape) for point, shape in shapes.items()}
        expected = holdings(batch.microbatches, wanted, self.stages, self.groups.topology)
        divisors = divisors and not wanted.pools
        dtype = wanted.dtype(self._like.dtype)
        slices = gather_slices(buffer, expected, self.groups, widths=widths, dtype=dtype, divisors=divisors)
        here = gather == "all" or self.groups.place.rank == 0
        whole = batch.assembler.assemble(slices, widths if here else {}, self._like)
        if gather == "all":
            for point in wanted.points:
                dist.broadcast(whole[point], group=self.groups.world, group_src=0)
        if wanted.pools:
            ends = torch.arange(len(batch.lengths)), torch.tensor(batch.lengths) - 1
            whole = {point: states[ends] for point, states in whole.items()}
        return {point: states.unflatten(-1, shapes[point]) for point, states in whole.items()}

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

    @property
    def _like(self) -> Tensor:
        return torch.empty(0, dtype=self.config.params_dtype, device=self.groups.device)

    @property
    def _shape(self) -> DecoderShape:
        if self.architecture is not None:
            return self.architecture.shape
        config = self.config
        return DecoderShape(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            head_dim=config.kv_channels,
            ffn_hidden_size=config.ffn_hidden_size,
            vocab_size=config.vocab_size,
        )


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


def _check_gather(gather: str, allowed: Sequence[str]) -> None:
    if gather not in allowed:
        raise ConfigError("gather", f"must be one of {', '.join(allowed)}", gather)


def _no_tokens(_first_row: int, length: int) -> Tensor:
    """Where states are given, no embedding reads the tokens."""
    return torch.zeros(length, dtype=torch.int64)


def _given(batch: Batch, start: int | None) -> Callable[[int, int], Tensor] | None:
    return None if start is None else batch.rows


def _ignore(_done: Microbatch | LocalSlice) -> None:
    """Nobody waits to hear of it."""
