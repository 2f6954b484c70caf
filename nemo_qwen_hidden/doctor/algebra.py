"""What has to hold between the sites of one observation, whatever the model's weights are. R: rows, W: width."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_qwen_hidden.doctor.observation import Observation
from nemo_qwen_hidden.doctor.report import FAILED, OK, SKIPPED, Check, Place, counted, number, some
from nemo_qwen_hidden.doctor.rounding import UNIT_ROUNDOFF, row_errors, stored_errors, value_bounds
from nemo_qwen_hidden.hookpoint import (
    ATTN_OUT,
    EMBED,
    FINAL_NORM,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    HookPoint,
)

FINITE, TRANSPORT, ATTENTION_SUM, MLP_SUM, NORM = (
    "values are finite",
    "resid_pre = the state before it",
    "resid_mid = resid_pre + attn_out",
    "resid_post = resid_mid + mlp_out",
    "final_norm = norm of the last resid_post",
)
# the sum itself is rounded once; its terms are as they were computed
_SUM_SLACK = 1.01
# square, mean, root, division and weight, each rounded; Transformer Engine's order of them is another
_NORM_ROUNDINGS = 4
_NORM_FP32_ERROR = 1e-6


@dataclass(frozen=True, kw_only=True)
class FinalNorm:
    """weight: fp32 [H] of the model's final RMSNorm, x / sqrt(mean(x**2) + epsilon) * weight."""

    weight: Tensor
    epsilon: float

    def __call__(self, values: Tensor) -> Tensor:
        """fp32 [R, H] after the norm."""
        return self.unweighted(values) * self.weight

    def unweighted(self, values: Tensor) -> Tensor:
        """fp32 [R, H] after the division, without the weight."""
        wide = values.double()
        return (wide / (wide.square().mean(dim=1, keepdim=True) + self.epsilon).sqrt()).float()


def checks(observation: Observation, *, num_layers: int, norm: FinalNorm | None) -> tuple[Check, ...]:
    """Each identity over all layers whose sites are there; norm: None where the model's is not known."""
    return (
        _finite(observation),
        _transport(observation, num_layers),
        _sum(observation, num_layers, ATTENTION_SUM, (RESID_PRE, ATTN_OUT, RESID_MID)),
        _sum(observation, num_layers, MLP_SUM, (RESID_MID, MLP_OUT, RESID_POST)),
        _normed(observation, num_layers, norm),
    )


def _finite(observation: Observation) -> Check:
    for point, values in observation.states.items():
        bad = observation.present & ~values.isfinite().all(dim=1)
        if bool(bad.any()):
            rows = bad.nonzero()[:, 0]
            kinds = [name for name, found in (("NaN", values.isnan()), ("infinite", values.isinf())) if found.any()]
            detail = f"{' and '.join(kinds)} in {len(rows)} of {int(observation.present.sum())} rows"
            return Check(name=FINITE, status=FAILED, detail=detail, place=_place(observation, point, int(rows[0])))
    return Check(name=FINITE, status=OK, detail=f"at {counted(len(observation.states), 'hook point')}")


def _transport(observation: Observation, num_layers: int) -> Check:
    """Bit by bit: nothing is computed between the two, it only travels, perhaps to another stage."""
    compared = 0
    for layer in range(num_layers):
        before = HookPoint(RESID_POST, layer - 1) if layer else HookPoint(EMBED)
        point = HookPoint(RESID_PRE, layer)
        if before not in observation.states or point not in observation.states:
            continue
        compared += 1
        left, right = observation.states[point], observation.states[before]
        differs = observation.present & ((left != right) & ~(left.isnan() & right.isnan())).any(dim=1)
        if bool(differs.any()):
            rows = differs.nonzero()[:, 0]
            detail = f"{point} differs from {before} in {len(rows)} rows"
            place = _place(observation, point, int(rows[0]))
            return Check(name=TRANSPORT, status=FAILED, detail=detail, place=place)
    return _done(
        TRANSPORT, compared, f"bit-equal at {counted(compared, 'layer')}", "needs resid_pre and the state before it"
    )


def _sum(observation: Observation, num_layers: int, name: str, sites: Sequence[str]) -> Check:
    """Value by value: a sum is rounded once to the compute dtype, and each of the three once when it is stored."""
    compared, worst = 0, 0.0
    for layer in range(num_layers):
        points = [HookPoint(site, layer) for site in sites]
        if not all(point in observation.states for point in points):
            continue
        compared += 1
        first, second, total = (observation.states[point] for point in points)
        bounds = value_bounds(total, observation.compute) * _SUM_SLACK + 2 * value_bounds(total, "fp32")
        if observation.stored != observation.compute:
            for values in (first, second, total):
                bounds = bounds + value_bounds(values, observation.stored) * _SUM_SLACK
        off = (total.double() - (first.double() + second.double())).abs()
        ratio = torch.where(observation.present, (off / bounds.double().clamp_min(1e-300)).amax(dim=1), 0.0)
        if bool((ratio > 1).any()):
            rows = (ratio > 1).nonzero()[:, 0]
            detail = f"at layer {layer} off by up to {number(float(ratio.max()))} times the rounding of the sum"
            place = _place(observation, points[2], int(rows[0]))
            return Check(name=name, status=FAILED, detail=f"{detail}, in {len(rows)} rows", place=place)
        worst = max(worst, float(ratio.max()))
    return _done(
        name, compared, f"{counted(compared, 'layer')}, within {worst:.2f} of one rounding", f"needs {some(sites)}"
    )


def _normed(observation: Observation, num_layers: int, norm: FinalNorm | None) -> Check:
    before, after = HookPoint(RESID_POST, num_layers - 1), HookPoint(FINAL_NORM)
    if norm is None:
        return Check(name=NORM, status=SKIPPED, detail="the model's norm is not known")
    if before not in observation.states or after not in observation.states:
        return Check(name=NORM, status=SKIPPED, detail=f"needs {before} and {after}")
    found, given = observation.states[after], observation.states[before]
    expected = norm(given)
    tolerance = torch.full((observation.rows,), _NORM_FP32_ERROR)
    tolerance = tolerance + _NORM_ROUNDINGS * UNIT_ROUNDOFF[observation.compute]
    if observation.stored != observation.compute:
        # an error of the input comes through the norm about as large as it goes in, and again its own storing
        gain = float(norm.weight.abs().max() / norm.weight.square().mean().sqrt())
        tolerance = tolerance + 2 * gain * stored_errors(given, observation.stored)
        tolerance = tolerance + stored_errors(expected, observation.stored)
    errors = torch.where(observation.present, row_errors(found, expected), 0.0)
    wrong = (errors > tolerance).nonzero()[:, 0]
    if len(wrong):
        detail = f"off by up to {number(float(errors.max()))} of a row, in {len(wrong)} rows"
        return Check(name=NORM, status=FAILED, detail=detail, place=_place(observation, after, int(wrong[0])))
    return Check(name=NORM, status=OK, detail=f"within {number(float(errors.max()))} of a row")


def _done(name: str, compared: int, detail: str, needs: str) -> Check:
    if not compared:
        return Check(name=name, status=SKIPPED, detail=needs)
    return Check(name=name, status=OK, detail=detail)


def _place(observation: Observation, point: HookPoint, row: int) -> Place:
    document, token = observation.place(row)
    return Place(hook_point=str(point), document=document, token=token)
