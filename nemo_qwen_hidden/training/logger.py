"""NeMo's logger and checkpoint callback, with what NeMo 2.7.3 leaves out."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

from lightning.pytorch import LightningModule, Trainer
from nemo.lightning import ModelCheckpoint, NeMoLogger, nemo_logger


class Logger(NeMoLogger):
    """NeMo's logger. NeMo 2.7.3 asks of each checkpoint callback whether it is one of ``nvidia_resiliency_ext``, also
    where that package is missing (``lightning/nemo_logger.py:208,253``): there none is."""

    def _setup_trainer_model_checkpoint(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        known = nemo_logger.lcp if nemo_logger.HAVE_RES else SimpleNamespace(LocalCheckpointCallback=())
        with mock.patch.object(nemo_logger, "lcp", known):
            super()._setup_trainer_model_checkpoint(trainer, *args, **kwargs)


class Checkpoints(ModelCheckpoint):
    """NeMo's callback, which ends every run with a checkpoint, and puts one after the validation of the same step.

    NeMo 2.7.3 makes no last one where validation follows the last step
    (``lightning/pytorch/callbacks/model_checkpoint.py:384``). It writes one that is due before the validation, and
    takes it for one from after it when it resumes, so that a validation which a crash has cut off would be left out
    (``NoValOnRestartTrainingLoop`` in ``lightning/pytorch/trainer.py:27``).
    """

    _first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As NeMo's."""
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """As NeMo's, where no validation follows."""
        if not _validates(trainer):
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As NeMo's, and what was put off."""
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As NeMo's, and the last step's checkpoint."""
        super().on_train_end(trainer, pl_module)
        if trainer.global_step not in (self._first_step, self._last_global_step_saved):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _validates(trainer: Trainer) -> bool:
    """Whether a validation follows the step that was done."""
    every = trainer.val_check_interval
    return trainer.enable_validation and isinstance(every, int) and trainer.global_step % every == 0
