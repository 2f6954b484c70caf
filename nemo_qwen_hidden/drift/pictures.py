"""The drift over all captured steps of a store, as pictures. The same values give the same bytes.

Colours are those of viridis, from dark to light, which people tell apart who do not see red or green, and so does paper
without colours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.drift.report import Report, Series, classes_of
from nemo_qwen_hidden.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

FORMATS = ("png", "svg")
DPI = 100
MOST_TICKS = 8
MOST_ROWS = 24
MOST_NUMBERED = 10
"""Steps of a heat map whose cells have their values written into them."""

MOST_MARKED = 25
"""Steps of a line that has a mark at each."""

_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


class MatplotlibMissingError(UserError, ImportError):
    """Pictures need matplotlib."""


def check_matplotlib() -> None:
    """Whether pictures can be drawn.

    Raises:
        MatplotlibMissingError: matplotlib cannot be imported; names the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        rule = "needs matplotlib, which the extra `pictures` brings: pip install 'nemo_qwen_hidden[pictures]'"
        raise MatplotlibMissingError("--to", rule, "not installed") from error


def draw(report: Report, folder: Path, *, form: str = "png") -> list[Path]:
    """Writes ``similarity``, ``norms`` and, where the report has a probe, ``accuracy`` into ``folder``, which is there.

    Args:
        form: one of ``FORMATS``.

    Raises:
        MatplotlibMissingError: matplotlib cannot be imported.
    """
    check_matplotlib()
    drawn: list[tuple[str, Callable[[Report], Figure]]] = [("similarity", similarity), ("norms", norms)]
    if report.probe is not None:
        drawn.append(("accuracy", accuracy))
    written = []
    with _style():
        for name, picture in drawn:
            written.append(folder / f"{name}.{form}")
            picture(report).savefig(written[-1], dpi=DPI, metadata=_METADATA[form])
    return written


def similarity(report: Report) -> "Figure":
    """Heat maps, hook points by steps, of one scale: cosine and linear CKA; CKA without outliers too, where there are
    any."""
    since = f"to step {report.reference}"
    panels = [(f"mean cosine {since}", "cosine"), (f"linear CKA {since}", "cka_inliers")]
    if report.has_outliers:
        panels[1:] = [
            (f"linear CKA {since}, without outliers", "cka_inliers"),
            (f"linear CKA {since}, all states", "cka"),
        ]
    values = {name: np.array([report.measures[name][point] for point in report.hook_points]) for _, name in panels}
    low = min(0.99, *(float(np.nanmin(each, initial=1.0)) for each in values.values()))
    figure = _figure(1.6 + 4.2 * len(panels), 1.5 + 0.3 * min(max(len(report.hook_points), 4), MOST_ROWS))
    axes = list(figure.subplots(1, len(panels), sharey=True))
    for panel, (title, name) in zip(axes, panels, strict=True):
        image = _heat_map(panel, report, values[name], low)
        panel.set_title(title)
        panel.label_outer()
    figure.colorbar(image, ax=axes, pad=0.02)
    return figure


def norms(report: Report) -> "Figure":
    """Lines over steps, one for each hook point, without outliers: mean norm, that against the reference, and relative
    change."""
    where = report.steps.index(report.reference)
    norm = report.measures["norm_inliers"]
    relative = {point: tuple(value / values[where] for value in values) for point, values in norm.items()}
    step, outliers = report.reference, ", without outliers" if report.has_outliers else ""
    figure = _figure(12.0, 4.0)
    left, middle, right = panels = figure.subplots(1, 3)
    for axes, series in zip(panels, (norm, relative, report.measures["change_inliers"]), strict=True):
        _lines(axes, report, series)
    _decades(left, norm)
    left.set_title(f"mean norm of the states{outliers}")
    middle.set_title(f"mean norm / mean norm at step {step}")
    right.set_title(f"relative change since step {step}")
    right.set_ylabel(rf"$\|X_t - X_{{{step}}}\| \;/\; \|X_{{{step}}}\|$")
    _depth_bar(figure, panels, report)
    return figure


def accuracy(report: Report) -> "Figure":
    """Lines over steps, one for each hook point: what a linear probe is right about, beside the baseline."""
    assert report.probe is not None, "drawn of a report with a probe alone"
    figure = _figure(8.0, 4.4)
    axes = figure.subplots()
    _lines(axes, report, report.probe.accuracy)
    axes.axhline(report.probe.baseline, color="black", linestyle="--", label="always the most frequent class")
    axes.set_title(f"linear probe: {report.probe.name} ({classes_of(report.probe)})")
    axes.set_ylabel(f"accuracy on {report.probe.held_out:,} states\nof held-out documents")
    _depth_bar(figure, [axes], report)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's defaults, whatever the user has set, and ids in an SVG that do not change."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["axes.titlesize"] = 11.0
        matplotlib.rcParams["axes.axisbelow"] = True
        matplotlib.rcParams["svg.hashsalt"] = "nemo_qwen_hidden"
        yield


def _figure(width: float, height: float) -> "Figure":
    """Without pyplot, so that no state and no window is left."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _heat_map(axes: "Axes", report: Report, values: NDArray[np.float64], low: float) -> "AxesImage":
    """values: [hook points, steps]; grey where one is not defined. low: of the scale, which ends at 1."""
    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(bad="lightgrey")
    image = axes.imshow(values, origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=1.0, interpolation="none")
    rows, columns = _every(report.hook_points, MOST_ROWS), _every(report.steps, MOST_TICKS)
    axes.set_yticks(rows, [report.hook_points[place] for place in rows])
    axes.set_xticks(columns, [f"{report.steps[place]:,}" for place in columns])
    axes.set_xlabel("step")
    if len(report.steps) > MOST_NUMBERED or len(report.hook_points) > MOST_ROWS:
        return image
    form = ".3f" if low >= 0.95 else ".2f"  # or every number of a short run would be 1.00
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "white" if value < (low + 1) / 2 else "black"
            axes.text(column, row, f"{value:{form}}", ha="center", va="center", color=colour, fontsize=8)
    return image


def _every(items: Sequence[Any], most: int) -> list[int]:
    """The places of at most ``most`` of ``items``, at equal distances."""
    return list(range(0, len(items), -(-len(items) // most)))


def _lines(axes: "Axes", report: Report, series: Series) -> None:
    """One for each hook point, over true steps."""
    colours = _colours(len(report.hook_points))
    size = 3.5 if len(report.steps) <= MOST_MARKED else 0.0
    for point, colour in zip(report.hook_points, colours, strict=True):
        axes.plot(report.steps, series[point], color=colour, marker="o", markersize=size, linewidth=1.6)
    axes.set_xlabel("step")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _decades(axes: "Axes", series: Series) -> None:
    """A logarithmic axis where values differ much, with plain numbers at it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [value for values in series.values() for value in values if math.isfinite(value)]
    if not values or not 0 < 10 * min(values) < max(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _colours(count: int) -> Sequence[Any]:
    """From dark, the first hook point, to light, the last; without the palest, which is hard to see on white."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def _depth_bar(figure: "Figure", axes: "Sequence[Axes]", report: Report) -> None:
    """Which colour is which hook point, beside the panels: it never covers a line, however many there are."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(report.hook_points)
    norm = BoundaryNorm(np.arange(count + 1) - 0.5, count)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(_colours(count))), ax=axes, pad=0.02)
    places = _every(report.hook_points, MOST_ROWS)
    bar.set_ticks(places, labels=[report.hook_points[place] for place in places])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
