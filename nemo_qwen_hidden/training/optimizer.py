"""NeMo's Megatron optimizer with the Megatron-Core that is installed, on a GPU or without one."""

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

from megatron.core import optimizer as megatron_optimizer
from nemo.lightning import MegatronOptimizerModule
from nemo.lightning.megatron_parallel import MegatronParallel
from torch.optim import Optimizer

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.host import cuda_type_names


class MegatronOptimizer(MegatronOptimizerModule):
    """NeMo's module of Megatron's optimizer.

    NeMo 2.7.3 hands over ``no_weight_decay_cond``, ``scale_lr_cond`` and ``lr_mult`` (``lightning/_strategy_lib.py:712``),
    which megatron-core 0.16 no longer takes. Where none is set, they are left out; with an older Megatron nothing
    changes.
    """

    def optimizers(self, model: MegatronParallel) -> list[Optimizer]:
        """As NeMo's.

        Raises:
            ConfigError: a condition or multiplier that this Megatron would not hear of.
        """
        make = _without_conditions(megatron_optimizer.get_megatron_optimizer)
        with cuda_type_names(), mock.patch.object(megatron_optimizer, "get_megatron_optimizer", make):
            made: list[Optimizer] = super().optimizers(model)
            return made


def _without_conditions(make: Callable[..., Any]) -> Callable[..., Any]:
    if "no_weight_decay_cond" in inspect.signature(make).parameters:
        return make

    def made(
        *args: Any, no_weight_decay_cond: Any = None, scale_lr_cond: Any = None, lr_mult: float = 1.0, **kwargs: Any
    ) -> Any:
        usual = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}
        given = {"no_weight_decay_cond": no_weight_decay_cond, "scale_lr_cond": scale_lr_cond, "lr_mult": lr_mult}
        for name, value in given.items():
            if value != usual[name]:
                raise ConfigError(name, "must be left out with megatron-core 0.16 and later, which ignores it", value)
        return make(*args, **kwargs)

    return made
