"""The drift over all captured steps of a store: values, JSON, and tables for a terminal of 80 columns."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nemo_qwen_hidden.drift.change import MAX_NORM, Change, change
from nemo_qwen_hidden.drift.labels import Labels
from nemo_qwen_hidden.drift.probe_accuracy import Accuracy, Split, probe_accuracy, split
from nemo_qwen_hidden.drift.probe_set import ProbeSet

MEASURES = tuple(field.name for field in fields(Change))
MOST_STEPS, MOST_POINTS = 7, 12
ENOUGH_STATES = 10
"""For each number of a state: below it, CKA comes out too high."""

Series = Mapping[str, tuple[float, ...]]
"""By hook point, the value at each step."""

Done = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """name: what the linear probe tells apart. trained, held_out: numbers of states. baseline: of the held-out ones,
    the part that is of the most frequent class."""

    name: str
    classes: tuple[str, ...]
    trained: int
    held_out: int
    baseline: float
    accuracy: Series


@dataclass(frozen=True, kw_only=True)
class Report:
    """measures: for each field of ``change.Change`` its values by hook point and step, against step ``reference``."""

    store: str
    reference: int
    steps: tuple[int, ...]
    hook_points: tuple[str, ...]
    documents: int
    states: int
    widths: Mapping[str, int]
    max_norm: float
    measures: Mapping[str, Series]
    probe: ProbeReport | None

    @property
    def has_outliers(self) -> bool:
        """Whether there is one at any step and hook point."""
        return any(value > 0 for values in self.measures["outliers"].values() for value in values)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON values: null stands for what is not defined."""
        found: dict[str, Any] = _without_nan(asdict(self))
        return found


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def drift(
    probe: ProbeSet,
    *,
    reference: int | None = None,
    hook_points: Iterable[str] | None = None,
    labels: Labels | None = None,
    max_norm: float = MAX_NORM,
    done: Done | None = None,
) -> Report:
    """Compares every captured step with one of them.

    Args:
        reference: a step, by default the first. hook_points: names, by default all. labels: what a linear probe tells
            apart at every step; None for no probe. max_norm: see ``change.Change``.
        done: called with the bytes of states that were looked at, and all there are.

    Raises:
        StoreError: a step or hook point is not there, or steps hold states of other tokens.
        DataError: a probe cannot be trained on these labels.
    """
    first = probe.steps[0] if reference is None else reference
    points = probe.hook_points(hook_points)
    for step in probe.steps:
        probe.check_alike(step, first)
    read = None if labels is None else _Reading(labels, split(labels))
    changes: dict[str, list[Change]] = {point: [] for point in points}
    looked_at, total = 0, sum(map(probe.width, points)) * probe.size(first) * len(probe.steps) * 4
    for step in probe.steps:
        for point in points:
            changes[point].append(change(probe, point, step=step, reference=first, max_norm=max_norm))
            if read is not None:
                read.look(probe, point, step)
            looked_at += probe.width(point) * probe.size(step) * 4
            if done is not None:
                done(looked_at, total)
    return Report(
        store=probe.path,
        reference=first,
        steps=probe.steps,
        hook_points=points,
        documents=probe.documents(first),
        states=probe.size(first),
        widths={point: probe.width(point) for point in points},
        max_norm=max_norm,
        measures={
            name: {point: tuple(getattr(each, name) for each in by_step) for point, by_step in changes.items()}
            for name in MEASURES
        },
        probe=None if read is None else read.result(),
    )


class _Reading:
    """Takes the accuracies of a probe, step by step."""

    def __init__(self, labels: Labels, parts: Split) -> None:
        self._labels, self._parts = labels, parts
        self._found: dict[str, list[Accuracy]] = {}

    def look(self, probe: ProbeSet, point: str, step: int) -> None:
        found = probe_accuracy(probe, point, step=step, labels=self._labels, parts=self._parts)
        self._found.setdefault(point, []).append(found)

    def result(self) -> ProbeReport:
        return ProbeReport(
            name=self._labels.name,
            classes=self._labels.classes,
            trained=len(self._parts.train),
            held_out=len(self._parts.held_out),
            baseline=next(iter(self._found.values()))[0].baseline,
            accuracy={point: tuple(each.accuracy for each in found) for point, found in self._found.items()},
        )


def tables(report: Report) -> list[Table]:
    """The values that matter most, of at most ``MOST_POINTS`` hook points at ``MOST_STEPS`` steps, evenly chosen."""
    since, left_out = f"step {report.reference}", ", without outliers" if report.has_outliers else ""
    shown = [("cosine", f"mean cosine to {since}"), ("cka_inliers", f"linear CKA to {since}{left_out}")]
    if report.has_outliers:
        shown.append(("cka", f"linear CKA to {since}, all states"))
    shown += [
        ("change_inliers", f"relative change since {since}{left_out}"),
        ("norm_inliers", f"mean norm{left_out}"),
    ]
    found = [_table(report, title, name, report.measures[name]) for name, title in shown]
    if report.probe is not None:
        title = f"accuracy of a linear probe; of the most frequent class {report.probe.baseline:.3f}"
        found.append(_table(report, title, "accuracy", report.probe.accuracy))
    return found


def facts(report: Report) -> list[tuple[str, str]]:
    """What was compared, as labels and values."""
    found = [
        ("store", report.store),
        ("steps", f"{len(report.steps)}, from {report.steps[0]} to {report.steps[-1]}"),
        ("compared with", f"step {report.reference}"),
        ("states", f"{report.states:,} of {report.documents:,} documents, the same tokens at each step"),
        ("outliers", _outliers(report)),
    ]
    if report.probe is not None:
        sizes = f"{report.probe.trained:,} states to train on, {report.probe.held_out:,} of other documents held out"
        found += [("probe", f"{report.probe.name}: {classes_of(report.probe)}"), ("", sizes)]
    return [*found, *(("note", note) for note in notes(report))]


def notes(report: Report) -> list[str]:
    """What a reader of the values has to know."""
    found = []
    if len(report.steps) == 1:
        found.append("one step alone: it is compared with itself")
    wide = max(report.widths.values())
    if report.states < ENOUGH_STATES * wide:
        few = f"{report.states:,} states of {wide:,} numbers each"
        found.append(f"{few} are few: CKA comes out too high with fewer than {ENOUGH_STATES} states for each number")
    lost = max((max(values) for values in report.measures["nonfinite"].values()), default=0.0)
    if lost:
        found.append(f"up to {lost:,.0f} states of a step hold NaN or infinite values, and are left out")
    return found


def evenly(items: Sequence[Any], most: int) -> list[int]:
    """The places of at most ``most`` of ``items``, the first and the last among them."""
    if len(items) <= most:
        return list(range(len(items)))
    return [round(number * (len(items) - 1) / (most - 1)) for number in range(most)]


def _table(report: Report, title: str, name: str, series: Series) -> Table:
    form = ".4g" if name.startswith("norm") else ".3f"
    steps = evenly(report.steps, MOST_STEPS)
    points = [report.hook_points[place] for place in evenly(report.hook_points, MOST_POINTS)]
    rows = tuple((point, *(_shown(series[point][place], form) for place in steps)) for point in points)
    return Table(title, ("step", *(f"{report.steps[place]}" for place in steps)), rows)


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _outliers(report: Report) -> str:
    rule = f"norms above {report.max_norm:g} times the median of a step: "
    if not report.has_outliers:
        return f"{rule}none"
    most = max(value for values in report.measures["outliers"].values() for value in values if value > 0)
    return f"{rule}up to {100 * most:.2g} % of the states"


def classes_of(probe: ProbeReport) -> str:
    """The names of the classes, or of the first of many."""
    names = probe.classes
    return ", ".join(names if len(names) <= 6 else (*names[:5], f"... {len(names) - 5} more"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
