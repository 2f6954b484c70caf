"""What a model does with a batch of ragged sequences: hidden states, and parts of the model on given states.

All of it is collective over all ranks, which all pass the same arguments, and gives the same on every layout.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from nemo_qwen_hidden.capture.attention import AttentionWeights
from nemo_qwen_hidden.capture.choose import choice_of
from nemo_qwen_hidden.capture.edits import BoundEdit, Edit
from nemo_qwen_hidden.capture.gather import LocalStates, SliceBuffer, gather_slices, holdings
from nemo_qwen_hidden.capture.pipeline import Pipeline
from nemo_qwen_hidden.capture.staging import staged
from nemo_qwen_hidden.capture.taps import Capture, LocalSlice
from nemo_qwen_hidden.checkpoint.architecture import Architecture
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import (
    ATTN_WEIGHTS,
    EMBED,
    FINAL_NORM,
    RESID_POST,
    HookPoint,
    by_depth,
    expand,
)
from nemo_qwen_hidden.model.batch import Batch, check_token_ids
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.plan.microbatches import Microbatch, replica_of
from nemo_qwen_hidden.plan.shapes import state_shape

Gather = Literal["rank0", "all", "none"]
WHOLE = ("rank0", "all")
GATHER = (*WHOLE, "none")
MOST_BYTES = 2**30


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

    def of_this_replica(self, microbatches: Iterable[Microbatch]) -> Iterator[Microbatch]:
        """Those that this data-parallel replica runs."""
        place = self.groups.place
        return (each for each in microbatches if replica_of(each, place.topology.dp) == place.dp)

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
        layers = self.config.num_layers
        for edit in edits:
            if edit.hook_point.layer is not None and edit.hook_point.layer >= layers:
                rule = f"must name a layer from 0 to {layers - 1}"
                raise ConfigError("hook point of an edit", rule, str(edit.hook_point))
            if by_depth({edit.hook_point, *points}, layers)[-1] not in points:
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
        check_gather(gather, GATHER)
        buffer = SliceBuffer()
        pipeline = Pipeline(self.chunks, self.groups, stages=self.stages, capture=wanted, start=start)
        mine = self.of_this_replica(batch.microbatches)
        with staged(buffer, self.groups.device) as sink:
            pipeline.run(mine, batch.rows if start is None else _no_tokens, sink, _ignore, _given(batch, start))
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


def check_gather(gather: str, allowed: Sequence[str]) -> None:
    if gather not in allowed:
        raise ConfigError("gather", f"must be one of {', '.join(allowed)}", gather)


def _no_tokens(_first_row: int, length: int) -> Tensor:
    """Where states are given, no embedding reads the tokens."""
    return torch.zeros(length, dtype=torch.int64)


def _given(batch: Batch, start: int | None) -> Callable[[int, int], Tensor] | None:
    return None if start is None else batch.rows


def _ignore(_done: Microbatch | LocalSlice) -> None:
    """Nobody waits to hear of it."""
