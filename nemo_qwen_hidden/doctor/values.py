"""What the values themselves give away: dropout, clipping, rounding, a factor, one row or unit. R: rows, W: width."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_qwen_hidden.doctor.compare import Comparison
from nemo_qwen_hidden.doctor.hypothesis import Hypothesis
from nemo_qwen_hidden.doctor.observation import Observation, States
from nemo_qwen_hidden.doctor.report import number
from nemo_qwen_hidden.doctor.rounding import fits
from nemo_qwen_hidden.hookpoint import ATTN_OUT, EMBED, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE, HookPoint

LARGEST_FP16 = 65504.0
_DROPPED = (0.005, 0.95)
_MOST_OF_IT = 0.99
_BEYOND = {"fp32": 1.001, "fp16": 1.01, "bf16": 1.05}
_ADDENDS = {RESID_MID: (RESID_PRE, ATTN_OUT), RESID_POST: (RESID_MID, MLP_OUT)}


def dropout_of(observation: Observation, expected: States, point: HookPoint) -> tuple[float, float] | None:
    """Share of values that are zero at ``point``, and the factor on the others, where these look like dropout: the
    embeddings, or what was added to the residual stream to come to ``point``."""
    found, wanted = _increment(observation.states, point), _increment(expected, point)
    if found is None or wanted is None:
        return None
    rows = observation.present
    found, wanted = found[rows], wanted[rows]
    scale = float(wanted.abs().median())
    telling = wanted.abs() > scale  # where a zero, and a ratio, stand out of rounding
    ratio = found[telling] / wanted[telling]
    dropped = ratio.abs() < 1e-2
    share = float(dropped.float().mean())
    if not _DROPPED[0] <= share <= _DROPPED[1]:
        return None
    factor = float(ratio[~dropped].median())
    even = float(((ratio[~dropped] - factor).abs() < 1e-2 * abs(factor)).float().mean())
    # the share of a sample of n values lies within 5 standard deviations of the rate that the factor tells
    rate = 1 - 1 / factor if factor > 1 else -1.0
    spread = 5 * (max(rate, 0.0) * (1 - max(rate, 0.0)) / max(1, len(ratio))) ** 0.5
    return (share, factor) if even > 0.99 and abs(rate - share) <= spread + 1e-3 else None


def _increment(states: States, point: HookPoint) -> Tensor | None:
    if point.site == EMBED:
        return states.get(point)
    if point.site not in _ADDENDS or point not in states:
        return None
    before = HookPoint(_ADDENDS[point.site][0], point.layer)
    return states[point] - states[before] if before in states else None


def factors(observation: Observation, expected: States, wrong: Sequence[HookPoint]) -> Iterator[Hypothesis]:
    """One factor on all values of each hook point."""
    found: dict[HookPoint, float] = {}
    for point in wrong:
        if point not in expected or expected[point].shape != observation.states[point].shape:
            continue
        wanted, seen = (values[observation.present].double() for values in (expected[point], observation.states[point]))
        if bool(seen.isfinite().all()) and bool(wanted.isfinite().all()) and float(wanted.square().sum()) > 0:
            found[point] = float((wanted * seen).sum() / wanted.square().sum())
    useful = {point: factor for point, factor in found.items() if abs(factor) > 1e-6 and abs(factor - 1) > 1e-3}
    if not useful:
        return

    def turn(states: States) -> States:
        return {point: values * useful.get(point, 1.0) for point, values in states.items()}

    said = sorted({f"{factor:.4g}" for factor in useful.values()})
    yield Hypothesis(fault="scaled", says=f"values are {' or '.join(said[:3])} times what they should be", turn=turn)


def clipped_at(found: Tensor, expected: Tensor, compute: str) -> float | None:
    """The bound that ``found`` was clipped at, where all that is clearly beyond it in ``expected`` is there."""
    bound = float(found.abs().max())
    beyond = expected.abs() > bound * _BEYOND[compute]
    if not bool(beyond.any()):
        return None
    at_bound = (found.abs() == bound) & (found.sign() == expected.sign())
    return bound if bool(at_bound[beyond].all()) else None


def clipped(observation: Observation, expected: States, wrong: Sequence[HookPoint]) -> Iterator[Hypothesis]:
    """Values above a bound were set to it."""
    rows = observation.present
    states, compute = observation.states, observation.compute
    bounds = {p: clipped_at(states[p][rows], expected[p][rows], compute) for p in wrong if p in expected}
    found = {point: bound for point, bound in bounds.items() if bound is not None}
    if not found:
        return

    def turn(states: States) -> States:
        return {
            point: values.clamp(-found[point], found[point]) if point in found else values
            for point, values in states.items()
        }

    point, bound = next(iter(found.items()))
    fp16 = ", the largest number of fp16" if bound == LARGEST_FP16 else ""
    yield Hypothesis(fault="clipped", says=f"values at {point} are clipped at {bound:g}{fp16}", turn=turn)


def precision_of(observation: Observation) -> str | None:
    """The coarsest dtype that holds every value exactly; None where only fp32 does."""
    present = [values[observation.present] for values in observation.states.values()]
    return next((dtype for dtype in ("bf16", "fp16") if all(fits(values, dtype) for values in present)), None)


def shape_of(comparison: Comparison, observation: Observation, expected: States) -> tuple[str, tuple[str, ...]]:
    """A fault that only says which rows or units differ at the first hook point, and lines that describe the error."""
    point = comparison.wrong[0]
    rows = comparison.wrong_rows(point)
    present = int(observation.present.sum())
    errors = comparison.errors[point]
    lines = [f"error there up to {number(float(errors.max()))} of a row, in {len(rows)} of {present} rows"]
    found, wanted = observation.states[point], expected.get(point)
    fault = "unexplained"
    if wanted is not None and wanted.shape == found.shape:
        # each unit by its own size: a few of a language model's are hundreds of times larger than the others
        sizes = wanted[observation.present].square().mean(dim=0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        shares, units_by_share = ((found - wanted)[rows] / sizes).square().sum(dim=0).sort(descending=True)
        needed = int((shares.cumsum(dim=0) < _MOST_OF_IT * shares.sum()).sum()) + 1
        units = sorted(units_by_share[:needed].tolist())
        if len(units) <= max(1, found.shape[1] // 50):
            fault = "few-units"
            lines.append(f"nearly all of it in {len(units)} of {found.shape[1]} units: {units[:8]}")
        elif len(rows) <= max(1, present // 50):
            fault = "few-rows"
            places = [observation.place(int(row)) for row in rows[:4]]
            lines.append("in " + "; ".join(f"document {document}, token {token}" for document, token in places))
        elif len(rows) == present:
            lines.append("every token differs")
    lines.append(_along(comparison))
    return fault, tuple(lines)


def _along(comparison: Comparison) -> str:
    """How the error goes on through the model."""
    wrong = comparison.wrong
    points = list(comparison.errors)
    behind = [point for point in points[points.index(wrong[0]) :] if point not in wrong]
    first, last = (float(comparison.errors[point].max()) for point in (wrong[0], wrong[-1]))
    text = f"{len(wrong)} of {len(points)} hook points differ, from {number(first)} to {number(last)} at {wrong[-1]}"
    return text + (f"; {len(behind)} after the first agree" if behind else "")


def nonfinite_rows(observation: Observation) -> Tensor:
    """bool [R]: rows with a value that is not finite, at any hook point."""
    bad = torch.zeros(observation.rows, dtype=torch.bool)
    for values in observation.states.values():
        bad |= ~values.isfinite().all(dim=1)
    return bad & observation.present
