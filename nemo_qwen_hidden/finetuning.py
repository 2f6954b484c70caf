"""The fine-tuning command's wiring: what a run is, and what it has come to.

Two steps, so that whoever starts the ranks can stand between them: ``prepare`` (one process: what there is to do) and
``training.run.fit`` (every rank).
"""

from dataclasses import dataclass
from pathlib import Path

from nemo_qwen_hidden.config import FinetuneSettings
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.launch import has_gpus
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


def outcome(job: FinetuningJob, last: TrainingStep | None) -> Outcome:
    """What a run has come to, after every rank has returned."""
    found = sorted((job.run_path / jobs.CHECKPOINTS).glob("*-last"), key=lambda path: path.stat().st_mtime)
    return Outcome(checkpoint=found[-1], last=last)
