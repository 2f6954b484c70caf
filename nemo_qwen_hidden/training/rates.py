"""Learning rates of a run that is made longer than it was begun."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_qwen_hidden.progress import Phase, TrainingReport


class Lengthening(Callback):
    """Gives a resumed run the learning rates of ``max_steps`` steps, from the step that it resumes at on.

    A checkpoint has the scheduler's own length (``load_state_dict`` of torch's ``LRScheduler`` takes all that is in
    it), after which NeMo's schedule stays at its least rate (``core/optim/lr_scheduler.py:355`` of 2.7.3), and the
    optimizer's rate for the next step. Both are set here; the schedule is a function of the step and the length alone.
    """

    def __init__(self, max_steps: int, report: TrainingReport) -> None:
        self._max_steps, self._report = max_steps, report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint has been read by now."""
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            more = self._max_steps - scheduler.max_steps
            if not more:
                continue
            scheduler.max_steps += more
            scheduler.decay_steps += more
            scheduler.last_epoch -= 1  # the step that it is at is taken again
            scheduler.step()
            if trainer.is_global_zero:
                rates = f"learning rates are those of {self._max_steps} steps from step {trainer.global_step} on"
                self._report(Phase(rates))
