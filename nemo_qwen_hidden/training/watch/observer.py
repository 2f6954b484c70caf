"""Takes the states of what goes through the model in training, each exactly once.

Taps see a state only while the forward of the chunk that it is in runs. Recomputed layers run a second time in the
backward pass, outside of any chunk's forward, and are not looked at then. So it does not matter what is recomputed, and
nothing has to be asked of Megatron to know it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor, nn

from nemo_qwen_hidden.capture.rows import View, view_of
from nemo_qwen_hidden.capture.taps import Capture, Sink, Taps, tapped
from nemo_qwen_hidden.errors import ConfigError, HiddenStatesError
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, HookPoint
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.plan.microbatches import Microbatch
from nemo_qwen_hidden.plan.stages import points_of_stage
from nemo_qwen_hidden.training.watch.batches import tokens_on


@dataclass(frozen=True, kw_only=True)
class Fed:
    """What the model is fed with: a microbatch, its rows numbered; and token_ids [B, S]."""

    microbatch: Microbatch
    token_ids: Tensor


@dataclass
class _Passes:
    """What has gone forward through one chunk. same: of each microbatch, whether its token ids were those that were
    expected, on the model's device."""

    count: int = 0
    same: list[Tensor] = field(default_factory=list)


class Observer:
    """Sees the hook points ``capture.points`` in a model that somebody else runs.

    chunks: the parts of the model that this rank holds. stages: layer indices of every stage.

    Raises:
        ConfigError: attention weights, which are not captured in training.
        HiddenStatesError: a hook point is not where it should be, or the model runs from CUDA graphs.
    """

    def __init__(
        self, chunks: Sequence[MCoreGPTModel], groups: ProcessGroups, *, stages: Sequence[range], capture: Capture
    ) -> None:
        if any(point.site == ATTN_WEIGHTS for point in capture.points):
            rule = f"must leave out {ATTN_WEIGHTS} in training: they grow with the square of the tokens"
            raise ConfigError("hook_points", rule, [str(point) for point in capture.points])
        self._groups, self._capture = groups, capture
        self._chunks = list(zip(chunks, self._points(stages), strict=True))
        with self.watching(lambda number: None, lambda piece: None, microbatches=0):
            pass  # what cannot be tapped is refused now, not in the first step that is captured

    def _points(self, stages: Sequence[range]) -> list[tuple[HookPoint, ...]]:
        return [points_of_stage(self._capture.points, stages, stage) for stage in self._groups.place.stages]

    @contextmanager
    def watching(self, fed: Callable[[int], Fed | None], sink: Sink, *, microbatches: int) -> Iterator[None]:
        """While entered, ``sink`` gets what this rank answers for of the states of every microbatch that goes forward;
        to be entered for one step. Ranks of a tp or cp group exchange parts of states after a chunk's forward.

        fed: from the number of a microbatch in its step (every schedule of Megatron's takes a chunk's in order) to what
        it is, on every stage; None where nothing of it is captured.

        Raises:
            HiddenStatesError: on leaving, a chunk has not run ``microbatches`` forwards, or not on these token ids:
                something was captured as what it is not.
        """
        views: dict[int, View] = {}
        passes: list[_Passes] = []
        with ExitStack() as stack:
            for chunk, points in self._chunks:
                if points or chunk.pre_process:  # the first stage looks at token ids for all
                    taps = stack.enter_context(tapped(chunk, self._capture, points, (), self._groups, sink))
                    passes.append(_Passes())
                    before, after = self._hooks(chunk, taps, passes[-1], views, fed)
                    stack.callback(chunk.register_forward_pre_hook(before, with_kwargs=True).remove)
                    stack.callback(chunk.register_forward_hook(after).remove)
            yield
        for each in passes:
            if each.count != microbatches:
                raise HiddenStatesError(
                    f"a step of {microbatches} microbatches ran {each.count} forwards through one model chunk: "
                    "its hidden states cannot be told apart"
                )
            if not all(bool(same) for same in each.same):
                raise HiddenStatesError(
                    "the model was given other token ids than the data loader gave: hidden states can be captured "
                    "where the data step passes tokens on as they are, cut over context parallelism as Megatron does"
                )

    def _hooks(
        self,
        chunk: MCoreGPTModel,
        taps: Taps,
        passes: _Passes,
        views: dict[int, View],
        fed: Callable[[int], Fed | None],
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        """What is done before and after each forward of a chunk."""
        place = self._groups.place

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = passes.count
            passes.count += 1
            given = fed(number)
            if given is None:
                return
            if number not in views:
                views[number] = view_of(
                    given.microbatch, place.topology, cp=place.cp, tp=place.tp, choice=self._capture.choice
                )
            taps.view = views[number]
            input_ids = args[0] if args else kwargs.get("input_ids")
            if chunk.pre_process and input_ids is not None:
                expected = tokens_on(taps.view.spans, given.token_ids).to(input_ids.device, non_blocking=True)
                same = input_ids.shape == expected.shape
                passes.same.append((input_ids == expected).all() if same else torch.tensor(False))

        def after(*_: Any) -> None:
            if taps.view is not None:
                taps.settle()

        return before, after
