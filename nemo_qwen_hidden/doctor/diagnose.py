"""From a mismatch to what is wrong: tries the hypotheses, and believes one only where it makes the mismatch vanish.

A hypothesis is accepted if the first hook point that differed agrees under it, in every row and within the tolerance of
the dtype, and no hook point differs that agreed before. Of several the one is taken that leaves the fewest hook points
wrong, then the one with the smallest error. What is left wrong is looked at again, on top of what was found. Where none
is accepted, the mismatch is described and nothing is guessed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_qwen_hidden.doctor import inputs, labels, layers, orders, values, weights
from nemo_qwen_hidden.doctor.compare import Comparison, Noise, compare
from nemo_qwen_hidden.doctor.hypothesis import Hypothesis, together
from nemo_qwen_hidden.doctor.noise import noise_of
from nemo_qwen_hidden.doctor.observation import Observation, States
from nemo_qwen_hidden.doctor.reference import Reference
from nemo_qwen_hidden.doctor.report import UNEXPLAINED, Finding, number, some
from nemo_qwen_hidden.doctor.rounding import row_errors
from nemo_qwen_hidden.hookpoint import EMBED, RESID_POST, RESID_PRE, HookPoint

MOST_FAULTS = 3
_SCREENED_TOKENS = 64
_TIE = 1.2
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A hypothesis that was accepted, and how things look under it."""

    hypothesis: Hypothesis
    comparison: Comparison
    error: float

    def better_than(self, other: "Outcome | None") -> bool:
        """Explains more, or as much and clearly closer."""
        if other is None:
            return True
        left, theirs = len(self.comparison.wrong), len(other.comparison.wrong)
        return left < theirs or (left == theirs and self.error * _TIE < other.error)


class Diagnosis:
    """Looks for what is wrong with ``observation``.

    truth: the reference's states at the same hook points. noise: as ``noise_of`` gives it. coarse: gives the reference
    in another dtype, loaded when it is asked for.
    """

    def __init__(
        self,
        reference: Reference,
        observation: Observation,
        truth: States,
        noise: Noise,
        coarse: Callable[[str], Reference],
    ) -> None:
        self._reference, self._truth, self._noise, self._coarse = reference, truth, noise, coarse
        self._observation = observation
        self._points = [point for point in observation.states if point in truth]
        self._base: States = truth

    def findings(self) -> list[Finding]:
        """What is wrong, in the order in which it was found; empty where nothing is."""
        misfits = [point for point in self._points if self._observation.states[point].shape != self._truth[point].shape]
        if misfits:
            return [self._misfit(misfits[0])]
        found = []
        bad = values.nonfinite_rows(self._observation)
        if bool(bad.any()):
            found.append(self._nonfinite(bad))
            self._observation = replace(self._observation, kept=self._observation.present & ~bad)
            if not bool(self._observation.present.any()):
                return found
        comparison = compare(self._observation, self._truth, self._noise)
        held: list[Hypothesis] = []
        while comparison.wrong and len(held) < MOST_FAULTS:
            outcome = self._best(comparison, held)
            if outcome is None:
                break
            found.append(self._accepted(outcome, comparison))
            held.append(outcome.hypothesis)
            comparison = outcome.comparison
        if comparison.wrong:
            found.append(self._precision(comparison, held) or self._unexplained(comparison, held))
        return found

    # Trying

    def _best(self, comparison: Comparison, held: Sequence[Hypothesis]) -> Outcome | None:
        best: Outcome | None = None
        self._base = self._expected(held)
        for tier in self._tiers(comparison, held):
            for hypothesis in tier:
                outcome = self._judge(hypothesis, comparison, held)
                if outcome is not None and outcome.better_than(best):
                    best = outcome
            if best is not None and not best.comparison.wrong:
                break
        return best

    def _tiers(self, comparison: Comparison, held: Sequence[Hypothesis]) -> Iterator[Iterable[Hypothesis]]:
        """Cheap ones first: these rearrange states that are there already."""
        wrong, reference = comparison.wrong, self._reference
        yield orders.hypotheses(self._observation, wrong)
        if not held:
            yield labels.relabelled(reference, self._observation, wrong, self._noise)
        yield values.clipped(self._observation, self._base, wrong)
        yield values.factors(self._observation, self._base, wrong)
        yield [*inputs.hypotheses(reference), *weights.hypotheses(reference), *layers.hypotheses(reference, wrong[0])]
        yield self._fitted(comparison, held)
        yield self._nearest(comparison, self._base)

    def _expected(self, held: Sequence[Hypothesis]) -> States:
        if not held:
            return self._truth
        return together(held[:-1], held[-1]).expect(self._reference, self._observation, self._points)

    def _judge(self, hypothesis: Hypothesis, before: Comparison, held: Sequence[Hypothesis]) -> Outcome | None:
        """Whether ``hypothesis`` on top of ``held`` is accepted. Most are refused by one short passage alone."""
        first = before.wrong[0]
        expected = self._foretold(hypothesis, before, held)
        if expected is None or first not in expected:
            return None
        after = compare(self._observation, expected, self._noise)
        if first in after.wrong or not set(after.wrong) <= set(before.wrong):
            return None
        if not self._tells(expected[first], before.wrong_rows(first)):
            return None
        error = sum(float(errors.mean()) for errors in after.errors.values()) / len(after.errors)
        return Outcome(hypothesis=hypothesis, comparison=after, error=error)

    def _foretold(self, hypothesis: Hypothesis, before: Comparison, held: Sequence[Hypothesis]) -> States | None:
        """What would be found under ``hypothesis`` on top of ``held``; None where some of it is seen to be wrong."""
        first = before.wrong[0]
        if hypothesis.rearranges and hypothesis.turn is not None:
            only_first = hypothesis.turn({first: self._base[first]})
            if compare(self._observation, only_first, self._noise).wrong:
                return None
            return hypothesis.turn(self._base)
        stacked = together(held, hypothesis)
        if not stacked.whole and self._screened_out(stacked, before):
            return None
        return stacked.expect(self._reference, self._observation, self._points)

    def _screened_out(self, hypothesis: Hypothesis, before: Comparison) -> bool:
        first = before.wrong[0]
        index = self._short_passage(before.wrong_rows(first))
        small = self._observation.only([index], [first])
        depth = max([first.depth(self._reference.num_layers), *self._depths(hypothesis)])
        expected = hypothesis.expect(self._reference, small, [first], depth=max(1, depth))
        return first not in expected or bool(compare(small, expected, self._noise).wrong)

    def _depths(self, hypothesis: Hypothesis) -> list[int]:
        return [point.depth(self._reference.num_layers) for point in hypothesis.needs]

    def _short_passage(self, rows: Tensor) -> int:
        """The passage with the most of ``rows`` among those that are short, or the shortest with any."""
        starts = torch.tensor(self._observation.starts)
        counts = torch.bincount(torch.searchsorted(starts, rows, right=True) - 1, minlength=len(starts) - 1)
        lengths = [len(passage) for passage in self._observation.passages]
        touched = [index for index, count in enumerate(counts.tolist()) if count]
        short = [index for index in touched if lengths[index] <= _SCREENED_TOKENS]
        return max(short, key=lambda index: int(counts[index])) if short else min(touched, key=lengths.__getitem__)

    @staticmethod
    def _tells(expected: Tensor, wrong_rows: Tensor) -> bool:
        """Whether enough of the rows that were wrong are foretold, where a hypothesis leaves some open."""
        known = ~expected[wrong_rows].isnan().all(dim=1)
        return int(known.sum()) >= max(1, len(wrong_rows) // 20)

    # Hypotheses with a number or an order that has to be found first

    def _fitted(self, comparison: Comparison, held: Sequence[Hypothesis]) -> Iterator[Hypothesis]:
        """A rotary base that is in no list, found by its error at the first hook point that differs."""
        first = comparison.wrong[0]
        if first.site == EMBED or held:
            return
        index = self._short_passage(comparison.wrong_rows(first))
        small = self._observation.only([index], [first])

        def error(power: float) -> float:
            edit = weights.rope_base(10**power)
            depth = max(1, first.depth(self._reference.num_layers))
            states = self._reference.run(small, [first], edits=(edit,), depth=depth)
            return float(row_errors(small.states[first], states[first])[small.present].mean())

        coarse = min((2 + step / 2 for step in range(13)), key=error)
        base = 10 ** _minimum(error, coarse - 0.5, coarse + 0.5)
        yield weights.rope_base_hypothesis(base, weights.own_rope_base(self._reference), fitted=True)

    def _nearest(self, comparison: Comparison, expected: States) -> Iterator[Hypothesis]:
        """Whatever order the rows are in, by the nearest state at the deepest hook point that differs."""
        point = comparison.wrong[-1]
        if point not in expected or not bool(self._observation.present.all()):
            return
        if expected[point].shape != self._observation.states[point].shape or bool(expected[point].isnan().any()):
            return
        order = orders.nearest(self._observation.states[point], expected[point], self._noise[point])
        if order is not None and not torch.equal(order, torch.arange(len(order))):
            says = orders.describe(order, self._observation)
            yield orders.rearranged("tokens-permuted", says, order, comparison.wrong)

    # Saying

    def _accepted(self, outcome: Outcome, before: Comparison) -> Finding:
        place = before.first(self._observation)
        first, left = before.wrong[0], len(outcome.comparison.wrong)
        was, now = float(before.errors[first].max()), float(outcome.comparison.errors[first].max())
        evidence = [
            f"differs first at {place}: {number(was)} of the row's norm, and {number(now)} under this explanation",
            f"explains {len(before.wrong) - left} of the {len(before.wrong)} hook points that differ",
        ]
        return Finding(fault=outcome.hypothesis.fault, says=outcome.hypothesis.says, evidence=tuple(evidence))

    def _misfit(self, point: HookPoint) -> Finding:
        found, wanted = self._observation.states[point].shape[1], self._truth[point].shape[1]
        says = f"states at {point} are {found} numbers wide, where the model's are {wanted}: it is another model's"
        return Finding(fault="other-width", says=says)

    def _nonfinite(self, bad: Tensor) -> Finding:
        row = int(bad.nonzero()[0])
        states = self._observation.states
        point = next(point for point, found in states.items() if not bool(found[bad].isfinite().all()))
        document, token = self._observation.place(row)
        largest = float(self._truth[point].abs().max()) if point in self._truth else 0.0
        overflow = self._observation.compute == "fp16" or self._observation.stored == "fp16"
        if overflow and largest > values.LARGEST_FP16:
            says = f"values at {point} overflow fp16: they should be as large as {largest:.3g}, and fp16 ends at 65504"
            return Finding(fault="overflow", says=says, evidence=(f"{int(bad.sum())} rows",))
        says = (
            f"{int(bad.sum())} rows hold NaN or infinite values, first at {point}, document {document}, token {token}"
        )
        return Finding(fault="not-finite", says=says)

    def _precision(self, comparison: Comparison, held: Sequence[Hypothesis]) -> Finding | None:
        """Whether a coarser dtype than is claimed explains what is left."""
        claimed = self._observation.compute
        if claimed != "fp32":
            return None
        expected = self._expected(held)
        held_in = values.precision_of(self._observation)
        for dtype in ("fp16", "bf16"):
            computed = noise_of(self._reference, self._observation, self._truth, self._coarse(dtype))
            if held_in == dtype or (held_in == "bf16" and dtype == "fp16"):
                stored = replace(self._observation, stored=dtype)
                if not compare(stored, expected, self._noise).wrong:
                    says = f"values were rounded to {dtype} after they were computed, where {claimed} is claimed"
                    return Finding(fault="rounded", says=says, evidence=(self._worst(comparison),))
            if not compare(self._observation, expected, computed).wrong:
                says = f"the error is what computing in {dtype} gives, where {claimed} is claimed"
                return Finding(fault="computed-coarsely", says=says, evidence=(self._worst(comparison),))
        if not compare(replace(self._observation, stored="int8"), expected, self._noise).wrong:
            says = "the error is what storing in int8, with a scale for each row, gives"
            return Finding(fault="rounded", says=says, evidence=(self._worst(comparison),))
        return None

    def _worst(self, comparison: Comparison) -> str:
        point = max(comparison.wrong, key=lambda each: float(comparison.errors[each].max()))
        return f"error up to {number(float(comparison.errors[point].max()))} of a row, at {point}"

    def _unexplained(self, comparison: Comparison, held: Sequence[Hypothesis]) -> Finding:
        expected = self._expected(held)
        first, place = comparison.wrong[0], comparison.first(self._observation)
        dropped = values.dropout_of(self._observation, expected, first)
        if dropped is not None:
            share, factor = dropped
            kept = f"the others {factor:.4g} times as large"
            says = f"dropout is on: {share:.1%} of the values at {first} are dropped, {kept}"
            return Finding(fault="dropout", says=says, evidence=(f"differs first at {place}",))
        fault, lines = values.shape_of(comparison, self._observation, expected)
        lines = (f"differs first at {place}", *lines)
        alone = self._layers_alone() if not held else None
        if alone is not None:
            fault_alone, line = alone
            lines = (*lines, line)
            if fault == UNEXPLAINED:
                fault = fault_alone
        return Finding(fault=fault, says=DESCRIBED[fault], evidence=lines)

    def _layers_alone(self) -> tuple[str, str] | None:
        """Each layer of the reference on the states that this layer got: which layers compute something else."""
        states, count = self._observation.states, self._reference.num_layers
        given: dict[int, Tensor] = {}
        for layer in range(count):
            before = HookPoint(RESID_POST, layer - 1) if layer else HookPoint(EMBED)
            source = next((point for point in (HookPoint(RESID_PRE, layer), before) if point in states), None)
            if source is not None and bool(states[source].isfinite().all()):
                given[layer] = states[source]
        points = [point for point in self._points if point.layer in given and point.site != RESID_PRE]
        if len(given) < count or not points or not bool(self._observation.present.all()):
            return None
        comparison = compare(
            self._observation, self._reference.run(self._observation, points, given=given), self._noise
        )
        wrong: Mapping[int, list[HookPoint]] = {
            layer: [point for point in comparison.wrong if point.layer == layer] for layer in range(count)
        }
        others = [layer for layer, found in wrong.items() if found]
        if not others:
            return UNEXPLAINED, "every layer computes what it should from what it gets"
        sites = some([str(wrong[layer][0]) for layer in others])
        line = f"from what it gets, {_named(others)} of {count} computes something else, first at {sites}"
        return ("few-layers" if len(others) <= max(1, count // 4) else UNEXPLAINED), line


DESCRIBED = {
    UNEXPLAINED: "no hypothesis explains the difference",
    "few-units": "a few units of the states are wrong, and no hypothesis explains it",
    "few-rows": "a few rows are wrong, and no hypothesis explains it: damaged, or of other tokens",
    "few-layers": "some layers by themselves compute something else: other weights, or damaged ones",
}


def _named(numbers: Sequence[int]) -> str:
    listed = some([str(number) for number in numbers])
    return f"layer {listed}" if len(numbers) == 1 else f"layers {listed}"


def _minimum(error: Callable[[float], float], low: float, high: float, steps: int = 40) -> float:
    """Where ``error`` is smallest between two bounds, by golden section."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = error(left), error(right)
    for _ in range(steps):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = error(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = error(right)
    return (low + high) / 2
