"""What a run of ``benchmarks.extraction`` has found, as tables in Markdown and as a plot:

python -m benchmarks.report RESULT.json ... [--plot OUT.png]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.work import BF16, FP32, Errors
from benchmarks.worker import FLOOR, OURS, RIVALS, SCRIPT

ASKED_OF_SCRIPT = {"middle": 4.0, "all": 2.0, "last": 4.0}
ASKED_OF_BEST = {BF16: {"middle": 1.6, "all": 1.5, "last": 1.6}, FP32: {"middle": 1.25, "all": 1.25, "last": 1.25}}
ASKED_OF_FLOOR = 0.85
"""In bf16, of documents of equal lengths."""


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """seconds: of each round, by contestant; of floors by "floor in DTYPE". errors: of the states of the last round,
    against ours in fp32."""

    name: str
    title: str
    layers: int
    seconds: dict[str, list[float]]
    errors: dict[str, Errors] = field(default_factory=dict)

    def rate(self, who: str, tokens: int) -> tuple[float, float, float]:
        """Tokens a second: of the median, the slowest and the fastest round."""
        seconds = self.seconds[who]
        return tokens / median(seconds), tokens / max(seconds), tokens / min(seconds)

    def times(self, who: str, other: str) -> float:
        """How many times as long ``other`` took as ``who``."""
        return median(self.seconds[other]) / median(self.seconds[who])


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run. lengths: tokens of each document; equal: whether they were made so. choices: what contestants chose."""

    dtype: str
    lengths: Sequence[int]
    equal: bool
    cases: Sequence[CaseResult]
    choices: Mapping[str, Mapping[str, str]]
    machine: str
    versions: Mapping[str, str]
    command: str

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def corpus(self) -> str:
        if self.equal:
            return f"{len(self.lengths)} documents of {self.lengths[0]:,} tokens"
        low, middle, high = min(self.lengths), int(median(self.lengths)), max(self.lengths)
        spread = f"{low} to {high:,}, half of them up to {middle:,}"
        return f"{self.tokens:,} tokens in {len(self.lengths)} documents of {spread}"

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Result:
    """What ``Result.write`` has written."""
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cases = [
        CaseResult(**{**case, "errors": {who: Errors(**found) for who, found in case["errors"].items()}})
        for case in fields["cases"]
    ]
    return Result(**{**fields, "cases": cases})


def tables(result: Result) -> str:
    """One table for each case, in at most 100 columns. ratio: how many times as fast extract is, asked: what it should
    be. error: the median of a token's. of DTYPE: the floor's time in this dtype, divided by the contestant's."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    choices = "; ".join(
        f"{who}: {', '.join(f'{k} {v}' for k, v in made.items())}" for who, made in result.choices.items()
    )
    head = [f"{result.dtype}, {result.corpus}; {result.machine}", versions, choices]
    return "\n".join([*head, "", *(line for case in result.cases for line in (*_table(result, case), ""))])


def _table(result: Result, case: CaseResult) -> list[str]:
    floors = [who for who in case.seconds if who.startswith(FLOOR)]
    header = [case.title, "tokens/s (min..max)", "ratio", "asked", "error"]
    rows = [[*header, *(who.replace(f"{FLOOR} in", "of") for who in floors)], ["---"] * (len(header) + len(floors))]
    for who in case.seconds:
        middle, low, high = case.rate(who, result.tokens)
        ours = who == OURS or OURS not in case.seconds
        times = "" if ours or who in floors else f"{case.times(OURS, who):.2f}"
        error = f"{case.errors[who].median:.1e}" if who in case.errors else ""
        shares = [f"{case.times(who, floor):.2f}" for floor in floors]
        rates = f"{middle:.0f} ({low:.0f}..{high:.0f})"
        rows.append([who, rates, times, _asked(result, case, who), error, *shares])
    widths = [max(len(row[column]) for row in rows if row[0] != "---") for column in range(len(rows[0]))]
    return [_line(row, widths) for row in rows]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    if cells[0] == "---":
        return "|" + "|".join("-" * (width + 1) + ("-" if n == 0 else ":") for n, width in enumerate(widths)) + "|"
    first, *rest = cells
    return f"| {' | '.join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])} |"


def _asked(result: Result, case: CaseResult, who: str) -> str:
    """What is asked of ``extract`` against ``who``, or for itself of the floor."""
    best = min((each for each in RIVALS if each in case.seconds), key=lambda n: median(case.seconds[n]), default=None)
    if result.equal:
        return f"{ASKED_OF_FLOOR} of floor" if who == OURS and result.dtype == BF16 else ""
    if who == SCRIPT:
        return f"{ASKED_OF_SCRIPT[case.name]:g}"
    return f"{ASKED_OF_BEST[result.dtype][case.name]:g} (best)" if who == best else ""


def plot(results: Sequence[Result], path: Path) -> None:
    """Bars of tokens a second: a panel for each result, a group for each case; floors are marks above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 4 * len(results)), 4), layout="constrained")
    for panel, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        bars = [who for who in result.cases[0].seconds if not who.startswith(FLOOR)]
        floors = [who for who in result.cases[0].seconds if who.startswith(FLOOR)]
        width = 0.85 / len(bars)
        for number, who in enumerate(bars):
            rates = [case.rate(who, result.tokens) for case in result.cases]
            places = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(rates))]
            spread = [[middle - low for middle, low, _ in rates], [high - middle for middle, _, high in rates]]
            color = "tab:red" if who == OURS else str(0.75 - 0.5 * number / len(bars))
            panel.bar(places, [rate[0] for rate in rates], width, yerr=spread, label=who, color=color)
        for who in floors:
            heights = [case.rate(who, result.tokens)[0] for case in result.cases]
            ends = [group - 0.45 for group in range(len(heights))], [group + 0.45 for group in range(len(heights))]
            panel.hlines(heights, *ends, linestyles=":" if who.endswith(FP32) else "-", colors="black", label=who)
        panel.set_xticks(range(len(result.cases)), [case.title for case in result.cases])
        documents = f"{result.lengths[0]:,} tokens each" if result.equal else "ragged"
        panel.set_title(f"{result.dtype}, {len(result.lengths)} documents, {documents}")
        panel.set_ylabel("tokens/s to disk")
    legend = {
        label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="written with --json")
    parser.add_argument("--plot", type=Path, help="a file to draw, .png or .svg")
    asked = parser.parse_args()
    results = [read(path) for path in asked.results]
    print("\n".join(tables(result) for result in results))
    if asked.plot:
        plot(results, asked.plot)


if __name__ == "__main__":
    main()
