"""What a loss on a hidden state is.

A loss sees one state of one microbatch, on the rank that has it, as far as that rank has it. It gives its part of the
microbatch's loss: parts of ranks that hold different tokens add up to the loss. So a loss is a sum over the tokens that
a rank has, over a count that every rank knows, since each has the whole batch.

B: sequences, S: tokens of a sequence in the batch, C: those of them that this rank has at the residual sites, H: hidden
size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_qwen_hidden.capture.sites import has_site
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import RESIDUAL_SITES, HookPoint, expand
from nemo_qwen_hidden.plan.microbatches import Microbatch
from nemo_qwen_hidden.plan.slices import spans_of, stripe
from nemo_qwen_hidden.topology import Place
from nemo_qwen_hidden.training.losses.heads import StateHeads

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Which tokens of a batch a rank has at a hook point, in its order. positions: int64 [C], along the sequence axis.
    of_tp_group: the same of all ranks of its tp group, one after the other. batch: the whole of it, the same on all
    ranks of a replica and on every stage."""

    point: HookPoint
    positions: Tensor
    of_tp_group: Tensor
    batch: Batch

    @classmethod
    def at(cls, point: HookPoint, place: Place, batch: Batch) -> "Tokens":
        """Of a rank at a residual site. The batch has ``tokens`` [B, S], each sequence padded on the right."""
        topology, length = place.topology, batch["tokens"].shape[1]
        whole = Microbatch(index=0, segments=(), tokens=length, packed=False)
        spans = spans_of(whole, part=place.cp, parts=topology.cp)
        positions = of_tp_group = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        if topology.sp:
            own = stripe(len(positions), part=place.tp, parts=topology.tp)
            positions = positions[own.start : own.stop]
        return cls(point=point, positions=positions, of_tp_group=of_tp_group, batch=batch)

    def __getitem__(self, key: str) -> Tensor:
        """What the batch has under ``key``, whole.

        Raises:
            ConfigError: nothing.
        """
        if key not in self.batch:
            raise ConfigError("batch", f"must have `{key}` on every pipeline stage", sorted(self.batch))
        return self.batch[key]

    def own(self, values_BS: Tensor) -> Tensor:
        """[B, S] to [C, B]."""
        return values_BS[:, self.positions.to(values_BS.device)].t()

    def own_of_tp_group(self, values_BS: Tensor) -> Tensor:
        """[B, S] to [T, B], of all tokens of the tp group."""
        return values_BS[:, self.of_tp_group.to(values_BS.device)].t()

    def find(self, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """One position for each sequence: of those that this rank has, the indices along C, and the sequences, int64
        [n] each, ascending."""
        found = (positions_B[:, None].to(self.positions.device) == self.positions).nonzero()
        return found[:, 1], found[:, 0]


@dataclass(frozen=True, kw_only=True)
class StateLoss(ABC):
    """A loss on a state.

    Attributes:
        name: what it is logged as, and where its head lies in the checkpoint.
        hook_point: a residual site; a layer may be negative.
        weight: what its gradient is multiplied by; the logged value is not.
        every_tp_rank_has_all: whether each tp rank computes the loss of all tokens of the tp group also under sequence
            parallelism, in which case the parts of tp ranks do not add up to the loss, but are it.
    """

    name: str
    hook_point: str
    weight: float = 1.0

    every_tp_rank_has_all: ClassVar[bool] = False
    measured: ClassVar[tuple[str, ...]] = ()
    """Names of what ``measures`` gives."""

    @abstractmethod
    def part(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module | None) -> Tensor:
        """This rank's part of the microbatch's loss: fp32, a scalar, which depends on every parameter of the head even
        where this rank has none of the tokens."""

    def measures(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module | None) -> dict[str, Tensor]:
        """What else is to be known in validation: of each of ``measured`` this rank's part, as of the loss."""
        return {}

    def head(self, config: TransformerConfig) -> MegatronModule | None:
        """Makes the module that the loss trains along; None without one. The same weights on every layout."""
        return None

    def point(self, num_layers: int) -> HookPoint:
        """Where the state is taken.

        Raises:
            ConfigError: not one residual site of the model.
        """
        points = expand(self.hook_point, num_layers=num_layers, setting=f"hook point of loss {self.name}")
        if len(points) != 1 or points[0].site not in RESIDUAL_SITES:
            rule = f"must be one, at a residual site ({', '.join(RESIDUAL_SITES)})"
            raise ConfigError(f"hook point of loss {self.name}", rule, self.hook_point)
        return points[0]

    def add_head(self, chunk: MCoreGPTModel, config: TransformerConfig) -> None:
        """Makes the head a submodule of ``chunk`` where the hook point lies there; before DDP wraps the chunk."""
        if not has_site(chunk, self.point(config.num_layers)):
            return
        head = self.head(config)
        if head is not None:
            if not hasattr(chunk, "state_heads"):
                chunk.state_heads = StateHeads(config)
            chunk.state_heads.add_module(self.name, head)
