"""Hypotheses about names: right states, under the name of another hook point, or on the other side of the final norm.

S_n is the residual stream after n layers. R: rows, H: hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_qwen_hidden.doctor.algebra import FinalNorm
from nemo_qwen_hidden.doctor.compare import Noise
from nemo_qwen_hidden.doctor.hypothesis import Hypothesis
from nemo_qwen_hidden.doctor.observation import Observation, States
from nemo_qwen_hidden.doctor.reference import Reference
from nemo_qwen_hidden.doctor.report import some
from nemo_qwen_hidden.doctor.rounding import row_errors
from nemo_qwen_hidden.hookpoint import (
    ATTN_OUT,
    EMBED,
    FINAL_NORM,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    RESIDUAL_SITES,
    HookPoint,
)

AS_IT_IS, NORMED, DIVIDED = "as it is", "after the final norm", "divided as in the final norm, without its weight"


@dataclass(frozen=True)
class Source:
    """What a state may be in truth: that of a hook point, in one of three forms."""

    point: HookPoint
    form: str = AS_IT_IS

    def of(self, states: States, norm: FinalNorm) -> Tensor:
        """[R, H]"""
        values = states[self.point]
        if self.form == NORMED:
            return norm(values)
        return norm.unweighted(values) if self.form == DIVIDED else values

    def __str__(self) -> str:
        return str(self.point) if self.form == AS_IT_IS else f"{self.point} {self.form}"


def relabelled(
    reference: Reference, observation: Observation, wrong: Sequence[HookPoint], noise: Noise
) -> Iterator[Hypothesis]:
    """A hypothesis for each kind of confusion, about those hook points whose state is found elsewhere, and one for all
    of them together."""
    residual = [point for point in wrong if point.site in RESIDUAL_SITES]
    if not residual:
        return
    sources = _search(reference, observation, residual, noise)
    kinds: dict[tuple[str, str], dict[HookPoint, Source]] = {}
    for point, source in sources.items():
        kinds.setdefault(_kind(point, source, reference.num_layers), {})[point] = source
    for (fault, says), found in kinds.items():
        yield _renamed(fault, says, found, reference.norm)
    if len(kinds) > 1:
        (fault, says), _ = max(kinds.items(), key=lambda item: len(item[1]))
        everything = "; ".join(
            f"{said} ({some([str(point) for point in found])})" for (_, said), found in kinds.items()
        )
        yield _renamed(fault, everything, sources, reference.norm)


def _search(
    reference: Reference, observation: Observation, wrong: Sequence[HookPoint], noise: Noise
) -> Mapping[HookPoint, Source]:
    """For each of ``wrong`` the state of the model that it is, where it is one; on the passage with the most rows."""
    passages = range(len(observation.passages))
    starts = observation.starts
    rows = [int(observation.present[starts[index] : starts[index + 1]].sum()) for index in passages]
    small = observation.only([max(passages, key=rows.__getitem__)], wrong)
    count = reference.num_layers
    points = [HookPoint(EMBED), *(HookPoint(site, layer) for layer in range(count) for site in _PER_LAYER)]
    states = reference.run(small, points)
    forms = (AS_IT_IS, NORMED, DIVIDED)
    sources = [Source(point, form) for point in points for form in forms if form == AS_IT_IS or _in_stream(point)]
    values = {source: source.of(states, reference.norm) for source in sources}
    found: dict[HookPoint, Source] = {}
    for point in wrong:
        states_found = small.states[point]
        fitting = {
            source: float(row_errors(states_found, expected)[small.present].max())
            for source, expected in values.items()
            if expected.shape == states_found.shape
        }
        best = min(fitting, key=lambda source: fitting[source])
        if fitting[best] <= noise[point] and best != Source(point):
            found[point] = best
    return found


_PER_LAYER = (ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST)


def _in_stream(point: HookPoint) -> bool:
    return point.site in (EMBED, RESID_POST)


def _depth(point: HookPoint, num_layers: int) -> int | None:
    """n of S_n; None for what is no state of the stream between layers."""
    if point.site in (EMBED, RESID_POST):
        return point.depth(num_layers)
    return point.layer if point.site == RESID_PRE else None


def _kind(point: HookPoint, source: Source, num_layers: int) -> tuple[str, str]:
    """Fault and sentence."""
    last = HookPoint(RESID_POST, num_layers - 1)
    if source.form == DIVIDED:
        if point.site == FINAL_NORM:
            return "final-norm-weight", f"final_norm lacks the weight of the norm: it is {source}"
        return "norm-weight-left-off", "states went through the final norm without its weight"
    if source.form == NORMED:
        if point == last and source.point == last:
            return "after-final-norm", f"{point} is after the final norm, where it should be before it"
        if point.site == FINAL_NORM:
            return "final-norm-early", f"final_norm is the norm of {source.point}, not of {last}"
        if source.point == last:
            return "after-final-norm", f"{point} is final_norm: off by a layer, and after the final norm"
        return "norm-on-every-layer", "the final norm was applied to states before it"
    if point.site == FINAL_NORM:
        if source.point == last:
            return "before-final-norm", "final_norm is before the final norm"
        return "wrong-site", f"final_norm is {source.point}"
    own, other = _depth(point, num_layers), _depth(source.point, num_layers)
    if own is not None and other is not None:
        if abs(own - other) == 1:
            side = "earlier" if other < own else "later"
            return "layer-off-by-one", f"states are those of one layer {side} than their names say"
        return "layers-permuted", "states stand under the names of other layers"
    if point.layer == source.point.layer:
        return "wrong-site", f"{point.site} holds {source.point.site} of the same layer"
    return "wrong-site", f"{point.site} holds {source.point.site} of another layer"


def _renamed(fault: str, says: str, sources: Mapping[HookPoint, Source], norm: FinalNorm) -> Hypothesis:
    listed = some([f"{point} is {source}" for point, source in sources.items()])
    right = dict(sources)

    def turn(states: States) -> States:
        return {**states, **{point: source.of(states, norm) for point, source in right.items()}}

    needs = frozenset(source.point for source in sources.values())
    text = says if all(str(source.point) in says for source in sources.values()) else f"{says}: {listed}"
    return Hypothesis(fault=fault, says=text, turn=turn, needs=needs)
