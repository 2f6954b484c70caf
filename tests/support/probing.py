"""Training runs of tests with a probe set."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.parallel.launch import Rank
from tests.support.capturing import Captured, bystander
from tests.support.training import Job, trainer_of


@dataclass(frozen=True, kw_only=True)
class Probing:
    """A job, and arguments of ProbeSetCallback; None: without one. events: a folder for TensorBoard."""

    job: Job
    settings: dict[str, Any] | None
    events: Path | None = None
    weights: bool = False


@dataclass(kw_only=True)
class Probed(Captured):
    """extra: modes of modules, and whether taps were left, after the run."""

    training: list[bool] = field(default_factory=list)
    hooks: int = 0


def probe_in_training(rank: Rank, folder: Path, runs: Sequence[Probing]) -> list[Probed]:
    """One run after another, all over the same ranks."""
    return [_run(rank, folder, run) for run in runs]


def _run(rank: Rank, folder: Path, run: Probing) -> Probed:
    from lightning.pytorch.loggers import TensorBoardLogger

    from nemo_qwen_hidden.training.chunks import live_chunks
    from nemo_qwen_hidden.training.watch.probe_set import ProbeSetCallback

    found, job = Probed(), run.job
    callbacks = [] if run.settings is None else [ProbeSetCallback(**run.settings)]
    if run.events is not None:
        job = replace(job, trainer={**job.trainer, "logger": TensorBoardLogger(str(run.events), name="", version="")})
    with trainer_of(rank, job, folder, [*callbacks, bystander(found, run.weights)]) as (trainer, model, data):
        trainer.fit(model, data)
        modules = [module for chunk in live_chunks(trainer) for module in chunk.modules()]
        found.training = [module.training for module in modules]
        found.hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return found
