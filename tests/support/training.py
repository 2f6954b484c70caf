"""Tiny models in NeMo's Trainer on forked ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology

VOCAB = 384  # what every tp of the tests divides: padding would take part in the loss
SEQ_LENGTH = 16
LAYOUTS = {  # by ranks
    2: (
        Topology(tp=2),
        Topology(tp=2, sp=True),
        Topology(pp=2),
        Topology(pp=2, vp=2),
        Topology(cp=2),
        Topology(dp=2),
    ),
    4: (Topology(tp=2, pp=2),),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A few steps in a layout.

    model: NeMo's configuration beside what ``configure_training`` chooses, such as recompute settings. trainer:
    arguments of NeMo's Trainer. validation: blocks to validate on. own_model: our ``Qwen2HiddenModel`` instead of
    NeMo's ``Qwen2Model``.
    """

    topology: Topology = field(default_factory=Topology)
    steps: int = 3
    micro_batch_size: int = 1
    global_batch_size: int = 4
    lr: float = 1e-3
    clip_grad: float = 1.0
    dtype: str = "fp32"
    distributed_optimizer: bool = False
    validation: int = 0
    own_model: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a parameter, by Megatron's name of it in a checkpoint, [*shape] at ``offset`` in [*whole]."""

    name: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    values: np.ndarray


@dataclass(kw_only=True)
class Outcome:
    """Of one rank. losses, norms: by step, on rank 0 (elsewhere losses are 0 where it is not the last stage)."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    result: Any = None


def batch_blocks(count: int, seed: int = 11) -> torch.Tensor:
    """Random tokens [count, SEQ_LENGTH + 1]: block n is sample n."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count, SEQ_LENGTH + 1), generator=generator)


@contextmanager
def trainer_of(rank: Rank, job: Job, folder: Path, callbacks: Sequence[Any] = ()) -> Iterator[tuple[Any, Any, Any]]:
    """A Trainer, its model and its data, of one run on ranks that may do several one after another. Collective."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections.llm.gpt.model.qwen2 import Qwen2Model

    from nemo_qwen_hidden.checkpoint.architecture import read_architecture
    from nemo_qwen_hidden.model.config import configure_training
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.plan.stages import stages_of
    from nemo_qwen_hidden.training.data import BlockData
    from nemo_qwen_hidden.training.optimizer import MegatronOptimizer
    from nemo_qwen_hidden.training.ranks import as_if_torchrun
    from nemo_qwen_hidden.training.strategy import megatron_strategy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    topology = job.topology
    stages = stages_of(read_architecture(folder).shape.num_layers, pp=topology.pp, vp=topology.vp)
    sizes = {"seq_length": SEQ_LENGTH}
    config = configure_training(folder, topology, stages=stages, dtype=job.dtype, **sizes | job.model)
    optimizer = OptimizerConfig(
        optimizer="adam",
        lr=job.lr,
        clip_grad=job.clip_grad,
        use_distributed_optimizer=job.distributed_optimizer,
        bf16=job.dtype == "bf16",
        params_dtype=torch.bfloat16 if job.dtype == "bf16" else torch.float32,
    )
    kind = Qwen2HiddenModel if job.own_model else Qwen2Model
    model = kind(config, optim=MegatronOptimizer(optimizer))
    plugins = nl.MegatronMixedPrecision(precision="bf16-mixed") if job.dtype == "bf16" else None
    data = BlockData(
        batch_blocks(job.steps * job.global_batch_size),
        batch_blocks(job.validation, seed=12) if job.validation else None,
        seq_length=SEQ_LENGTH,
        samples=job.steps * job.global_batch_size,
        micro_batch_size=job.micro_batch_size,
        global_batch_size=job.global_batch_size,
    )
    with as_if_torchrun(rank):
        meeting = _next_rendezvous(rank)
        arguments: dict[str, Any] = {
            "max_steps": job.steps,
            "logger": False,
            "enable_checkpointing": False,
            "limit_val_batches": 1.0 if job.validation else 0,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "plugins": plugins,
        }
        trainer = nl.Trainer(
            accelerator="cpu",
            devices=rank.world,
            strategy=megatron_strategy(topology, stages=stages, dtype=job.dtype, rendezvous=meeting, **job.strategy),
            callbacks=list(callbacks),
            **arguments | job.trainer,
        )
        try:
            yield trainer, model, data
            dist.barrier()
        finally:
            destroy_num_microbatches_calculator()
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()


_RUNS = 0


def _next_rendezvous(rank: Rank) -> Path:
    global _RUNS
    _RUNS += 1
    return rank.rendezvous.with_name(f"rendezvous-{_RUNS}")


Wanted = Callable[[Any], Any]


def train(rank: Rank, folder: Path, jobs: Sequence[Job], callbacks: Sequence[Callable[[], Any]] = ()) -> list[Outcome]:
    """Trains in one layout after another, all over the same ranks; callbacks are made anew for each."""
    return [train_one(rank, job, folder, [make() for make in callbacks]) for job in jobs]


def train_one(
    rank: Rank, job: Job, folder: Path, callbacks: Sequence[Any] = (), result: Wanted | None = None
) -> Outcome:
    """``result``: of the trainer after the run."""
    outcome, watcher = Outcome(), _watcher()
    with trainer_of(rank, job, folder, [watcher, *callbacks]) as (trainer, model, data):
        trainer.fit(model, data)
        outcome.losses, outcome.norms, outcome.validation = watcher.losses, watcher.norms, watcher.validation
        outcome.pieces = pieces_of(trainer)
        if result is not None:
            outcome.result = result(trainer)
    return outcome


def _watcher() -> Any:
    import lightning.pytorch as pl

    class Watcher(pl.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.norms: list[float] = []
            self.validation: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))
            self.norms.append(float(trainer.callback_metrics["grad_norm"]))

        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            self.validation.append(float(trainer.callback_metrics["val_loss"]))

    return Watcher()


def pieces_of(trainer: Any) -> list[Piece]:
    """This rank's part of the weights."""
    return pieces_in(trainer.strategy.megatron_parallel.sharded_state_dict())


def pieces_in(state: dict[str, Any]) -> list[Piece]:
    """The tensors of a sharded state dict, as Megatron itself says what part of what they are."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    return [
        Piece(
            name=part.key[part.key.rindex("module.") + len("module.") :],
            whole=tuple(part.global_shape),
            offset=tuple(part.global_offset),
            values=part.data.detach().float().reshape(part.local_shape).numpy().copy(),
        )
        for part in nested_values(state)
        if isinstance(part, ShardedTensor) and part.data is not None
    ]


def whole_weights(ranks: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """Parameters by name, put together from the pieces of all ranks, which agree where they overlap."""
    weights: dict[str, np.ndarray] = {}
    for piece in (piece for outcome in ranks for piece in outcome.pieces):
        whole = weights.setdefault(piece.name, np.full(piece.whole, np.nan, np.float32))
        # an axis more on the left than values have: of the layer
        spot = tuple(
            slice(start, start + size)
            for start, size in zip(piece.offset, _padded(piece.values.shape, len(piece.whole)), strict=True)
        )
        there = whole[spot]
        same = np.isnan(there) | (there == piece.values)
        assert same.all(), f"ranks have different {piece.name}"
        whole[spot] = piece.values
    assert not any(np.isnan(whole).any() for whole in weights.values())
    return weights


def _padded(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    return (1,) * (axes - len(shape)) + shape
