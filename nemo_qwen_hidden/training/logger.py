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
    """NeMo's callback, which ends every run with a checkpoint. NeMo 2.7.3 makes none where validation follows the last
    step (``lightning/pytorch/callbacks/model_checkpoint.py:384``)."""

    _first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As NeMo's."""
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As NeMo's, and the last step's checkpoint."""
        super().on_train_end(trainer, pl_module)
        if trainer.global_step not in (self._first_step, self._last_global_step_saved):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
