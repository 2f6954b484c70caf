"""The fine-tuning command's wiring: what a run is, and what it has come to.

Three steps, so that whoever starts the ranks can stand between them: ``prepare`` (what there is to do), ``locked`` (one
process, as long as the run lasts) and ``training.run.fit`` (every rank).
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_qwen_hidden.config import FinetuneSettings
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.launch import has_gpus
from nemo_qwen_hidden.progress import TrainingStep
from nemo_qwen_hidden.store.write.locks import job_lock
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


def make_folder(job: FinetuningJob) -> None:
    """Makes the run's folder, beside which its log lies.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        job.run_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"must be a folder that can be made ({error.strerror})"
        raise ConfigError("run.path", rule, str(job.run_path)) from error


@contextmanager
def locked(job: FinetuningJob) -> Iterator[None]:
    """While entered, which one process does for all ranks before they touch the run's folder, no other run works in it.
    Takes away checkpoints that a crash has cut off, since NeMo does not start where there is one.

    Raises:
        ConfigError: another run works in the folder, and says who; or the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            held.enter_context(job_lock(job.run_path, of=jobs.RUN))
            for checkpoint in job.unfinished:
                if checkpoint.is_dir():
                    shutil.rmtree(checkpoint)
                checkpoint.with_name(f"{checkpoint.name}{jobs.UNFINISHED}").unlink(missing_ok=True)
        except OSError as error:
            rule = f"must be a folder that can be written ({error.strerror})"
            raise ConfigError("run.path", rule, str(job.run_path)) from error
        yield


def outcome(job: FinetuningJob, last: TrainingStep | None) -> Outcome:
    """What a run has come to, after every rank has returned."""
    return Outcome(checkpoint=job.checkpoints[-1], last=last)
