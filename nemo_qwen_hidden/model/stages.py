"""A model that somebody else has built: what NeMo has wrapped, and which layers each pipeline stage holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import nn

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.agree import all_values
from nemo_qwen_hidden.parallel.groups import ProcessGroups


def held_stages(chunks: Sequence[MCoreGPTModel], groups: ProcessGroups) -> tuple[range, ...]:
    """Layer indices of every stage, virtual ones counted, whatever way the layers were divided. Collective over all
    ranks.

    chunks: this rank's parts of the model, one for each of its stages.

    Raises:
        ConfigError: a stage's layers are not consecutive ones.
    """
    numbers = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks]
    own = list(zip(groups.place.stages, numbers, strict=True))
    everyone = all_values(own, groups)
    return _contiguous(dict(pair for pairs in everyone for pair in pairs), groups.topology.stages)


def _contiguous(numbers: Mapping[int, list[int]], count: int) -> tuple[range, ...]:
    """Megatron's layer numbers (from 1) of each stage, as ranges of layer indices (from 0)."""
    stages: list[range] = []
    for stage in range(count):
        start = stages[-1].stop if stages else 0
        stages.append(range(start, start + len(numbers[stage])))
        if [index + 1 for index in stages[-1]] != numbers[stage]:
            raise ConfigError("pipeline layout", "must keep each stage's layers together and in order", numbers)
    return tuple(stages)


def unwrapped(chunk: nn.Module) -> MCoreGPTModel:
    """What lies under NeMo's model, Megatron's DDP and its ``Float16Module``, which all call it ``module``.

    Raises:
        ConfigError: no Megatron ``GPTModel``.
    """
    module: Any = chunk
    while not isinstance(module, MCoreGPTModel):
        if not isinstance(getattr(module, "module", None), nn.Module):
            raise ConfigError("the trained model", "must be a Megatron GPTModel", type(module).__name__)
        module = module.module
    return module
