"""NeMo's logger where NVIDIA's resiliency extension is not installed."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

from lightning.pytorch import Trainer
from nemo.lightning import NeMoLogger, nemo_logger


class Logger(NeMoLogger):
    """NeMo's logger. NeMo 2.7.3 asks of each checkpoint callback whether it is one of ``nvidia_resiliency_ext``, also
    where that package is missing (``lightning/nemo_logger.py:208,253``): there none is."""

    def _setup_trainer_model_checkpoint(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        known = nemo_logger.lcp if nemo_logger.HAVE_RES else SimpleNamespace(LocalCheckpointCallback=())
        with mock.patch.object(nemo_logger, "lcp", known):
            super()._setup_trainer_model_checkpoint(trainer, *args, **kwargs)
