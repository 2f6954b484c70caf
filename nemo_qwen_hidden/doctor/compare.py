"""Two sets of states held together: what was found, and what is expected. R: rows, W: width."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nemo_qwen_hidden.doctor.observation import Observation, States
from nemo_qwen_hidden.doctor.report import Place
from nemo_qwen_hidden.doctor.rounding import row_errors, stored_errors
from nemo_qwen_hidden.hookpoint import HookPoint

Noise = Mapping[HookPoint, float]
"""The relative error of a row that the compute dtype explains, by hook point."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """errors, tolerances: fp32 [R] by hook point, in the order of the model; rows that are not there have no error."""

    errors: Mapping[HookPoint, Tensor]
    tolerances: Mapping[HookPoint, Tensor]

    @cached_property
    def wrong(self) -> tuple[HookPoint, ...]:
        """Hook points at which some row differs, in the order of the model."""
        return tuple(point for point, errors in self.errors.items() if bool((errors > self.tolerances[point]).any()))

    def wrong_rows(self, point: HookPoint) -> Tensor:
        """int64: the rows that differ there."""
        return (self.errors[point] > self.tolerances[point]).nonzero()[:, 0]

    def excess(self, point: HookPoint) -> float:
        """The largest error there as a multiple of what is tolerated."""
        return float((self.errors[point] / self.tolerances[point]).max())

    def first(self, observation: Observation) -> Place:
        """The first place that differs; IndexError where none does."""
        point = self.wrong[0]
        document, token = observation.place(int(self.wrong_rows(point)[0]))
        return Place(hook_point=str(point), document=document, token=token)


def compare(observation: Observation, expected: States, noise: Noise) -> Comparison:
    """Every hook point that both have. A row of NaN in ``expected`` stands for: not known."""
    errors: dict[HookPoint, Tensor] = {}
    tolerances: dict[HookPoint, Tensor] = {}
    for point, found in observation.states.items():
        if point not in expected:
            continue
        wanted = expected[point]
        if wanted.shape != found.shape:
            errors[point] = torch.full((observation.rows,), torch.inf)
            tolerances[point] = torch.zeros(observation.rows)
            continue
        free = wanted.isnan().all(dim=1)
        if observation.stored in ("fp32", observation.compute):
            stored = torch.zeros(observation.rows)
        else:
            stored = stored_errors(torch.where(free[:, None], 0.0, wanted), observation.stored)
        errors[point] = torch.where(observation.present, row_errors(found, wanted), 0.0)
        tolerances[point] = noise[point] + stored
    return Comparison(errors=errors, tolerances=tolerances)
