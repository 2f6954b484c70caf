"""What rounding alone does to a model on the tokens that are looked at: how much error is no fault."""

from math import sqrt

import torch
from torch import Tensor, nn

from nemo_qwen_hidden.doctor.compare import Noise
from nemo_qwen_hidden.doctor.observation import Observation, States
from nemo_qwen_hidden.doctor.reference import Edits, Reference
from nemo_qwen_hidden.doctor.rounding import FP32_ERROR, NOISE_MULTIPLE, UNIT_ROUNDOFF, row_errors


def noise_of(reference: Reference, observation: Observation, truth: States, coarse: Reference | None) -> Noise:
    """The error that the compute dtype explains at each hook point.

    coarse: the same model in the compute dtype; None where that is fp32. What it differs by from ``truth`` is what
    rounding does to this model on these tokens. For fp32, ``truth`` itself is run again with its linears rounded at
    random: some models amplify rounding a hundredfold at some sites, and none of it says that anything is wrong.
    """
    if coarse is None:
        rounded = reference.run(observation, list(truth), edits=(rounded_at_random,))
    else:
        rounded = coarse.run(observation, list(truth))
    return {
        point: FP32_ERROR + NOISE_MULTIPLE * float(row_errors(states, truth[point]).max())
        for point, states in rounded.items()
    }


def rounded_at_random(reference: Reference, edits: Edits) -> None:
    """An edit: every linear's output moves by about two roundings of fp32, as another order of its sums would move it
    (Monte Carlo arithmetic, Parker 1997). Seeded."""
    generator = torch.Generator().manual_seed(0)

    def move(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        size = output.norm(dim=-1, keepdim=True) / sqrt(output.shape[-1])
        noise = torch.randn(output.shape, generator=generator)
        moved: Tensor = output + noise * size * (2 * UNIT_ROUNDOFF["fp32"])
        return moved

    for layer in reference.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                edits.hook(module.register_forward_hook(move))
