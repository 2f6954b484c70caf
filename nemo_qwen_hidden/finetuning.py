"""The fine-tuning command's wiring: what a run is, and what it has come to.

Two steps, so that whoever starts the ranks can stand between them: ``prepare`` (one process: what there is to do) and
``training.run.fit`` (every rank).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nemo_qwen_hidden.config import FinetuneSettings
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.launch import has_gpus, is_first_rank
from nemo_qwen_hidden.progress import TrainingStep
from nemo_qwen_hidden.training import job as jobs
from nemo_qwen_hidden.training.job import FinetuningJob


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run. checkpoint: the last one's folder. last: the last step; None where nothing was left to do."""

    checkpoint: Path
    last: TrainingStep | None


def prepare(settings: FinetuneSettings, *, world: int | None) -> FinetuningJob:
    """As ``training.job.prepare``, for ranks that torchrun has started, or else that are to be started here.

    Raises:
        UserError: the first thing that stands in the way, or ``ConfigErrors`` with several.
    """
    job = jobs.prepare(settings, world=world)
    if world is None and has_gpus():
        rule = (
            "must be started by torchrun on a machine with GPUs (torchrun --nproc-per-node N -m nemo_qwen_hidden ...)"
        )
        raise ConfigError("finetune", rule, "started alone")
    return job


def tidy(job: FinetuningJob) -> None:
    """Makes the run's folder; the first rank takes away checkpoints that a crash has cut off, since NeMo does not start
    where there is one. Before anything else touches the folder.

    Raises:
        ConfigError: the folder cannot be made.
    """
    try:
        job.run_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"must be a folder that can be made ({error.strerror})"
        raise ConfigError("run.path", rule, str(job.run_path)) from error
    for checkpoint in job.unfinished if is_first_rank() else ():
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        checkpoint.with_name(f"{checkpoint.name}{jobs.UNFINISHED}").unlink(missing_ok=True)


def outcome(job: FinetuningJob, last: TrainingStep | None) -> Outcome:
    """What a run has come to, after every rank has returned."""
    return Outcome(checkpoint=job.checkpoints[-1], last=last)
