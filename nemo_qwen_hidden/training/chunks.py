"""The model that NeMo trains, under what NeMo and Megatron have wrapped around it."""

from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo.lightning.pytorch.callbacks import PEFT
from torch import nn

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.model.stages import held_stages, unwrapped
from nemo_qwen_hidden.parallel.groups import ProcessGroups, current_groups

_GROUPS: "WeakKeyDictionary[nn.Module, ProcessGroups]" = WeakKeyDictionary()  # making them is collective: once a model


def live_chunks(trainer: Trainer) -> list[MCoreGPTModel]:
    """This rank's parts of the model in training, one, or one for each virtual stage, in the order of the stages.

    Raises:
        ConfigError: the trainer has no NeMo ``MegatronStrategy`` that is set up, or trains no Megatron ``GPTModel``.
    """
    return [unwrapped(chunk) for chunk in _parallel(trainer)]


def live_groups(trainer: Trainer) -> ProcessGroups:
    """Where this rank stands in the training run. The first call for a model is collective over all ranks."""
    parallel = _parallel(trainer)
    if parallel not in _GROUPS:
        sequence_parallel = bool(unwrapped(parallel[0]).config.sequence_parallel)
        _GROUPS[parallel] = current_groups(sp=sequence_parallel)
    return _GROUPS[parallel]


def live_stages(trainer: Trainer) -> tuple[range, ...]:
    """Layer indices of every pipeline stage, virtual ones counted. Collective over all ranks."""
    return held_stages(live_chunks(trainer), live_groups(trainer))


def live_peft(trainer: Any) -> PEFT | None:
    """What of NeMo's trains an adapter in place of the weights; None: the weights themselves are trained."""
    return next((each for each in trainer.callbacks if isinstance(each, PEFT)), None)


def _parallel(trainer: Trainer) -> Any:
    """NeMo's ``MegatronParallel``: a list of the model's chunks."""
    parallel = getattr(trainer.strategy, "megatron_parallel", None)
    if parallel is None:
        rule = "must be NeMo's MegatronStrategy (or megatron_strategy() of this package), once it is set up"
        raise ConfigError("the trainer's strategy", rule, type(trainer.strategy).__name__)
    return parallel
