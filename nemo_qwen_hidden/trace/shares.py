"""What a rank's main thread spends its time on while the model runs, from a trace."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.trace.record import MAIN
from nemo_qwen_hidden.trace.whole import events

RUNNING = "running"
FORWARD = "forward"
KINDS: Mapping[str, str] = {
    FORWARD: "compute",
    "tap": "copy",
    "exchange": "exchange",
    "gather": "exchange",
    "encode": "encode",
    "receive": "peer",
    "send": "peer",
    "wait for all": "peer",
    "wait for disk": "disk",
}
"""Spans of the main thread within ``running``, and what their time counts as; ``peer`` and ``disk`` is waiting for
them. Time in none of these spans is ``other``."""
NAMES = (*dict.fromkeys(KINDS.values()), "other")

Span = tuple[float, float, str]
"""Start and end in microseconds, name."""


@dataclass(frozen=True, kw_only=True)
class RankShares:
    """Of one rank. label: its place. secs: from the first to the last moment of the running phase. shares: of these, by
    ``NAMES``; they add up to 1. microbatches: forwards, one for each microbatch and stage that the rank ran."""

    rank: int
    label: str
    secs: float
    shares: Mapping[str, float]
    microbatches: int


def shares(path: Path) -> list[RankShares]:
    """What the ranks of a trace spend their time on while they run, by rank; those that never ran are left out.

    Time counts once, for the innermost span: what a tap copies inside of ``forward`` is copying, not computing.

    Raises:
        ConfigError: ``path`` is no whole trace.
    """
    labels: dict[int, str] = {}
    main: dict[int, int] = {}
    spans: dict[int, list[Span]] = {}
    for event in events(path):
        _take(event, labels, main, spans)
    return [found for rank in sorted(spans) if (found := _of_rank(rank, labels[rank], spans[rank])) is not None]


def _take(event: Mapping[str, Any], labels: dict[int, str], main: dict[int, int], spans: dict[int, list[Span]]) -> None:
    rank = event["pid"]
    if event["name"] == "process_name":
        labels[rank] = event["args"]["name"]
    elif event["name"] == "thread_name" and event["args"]["name"] == MAIN:
        main[rank] = event["tid"]
    elif event["ph"] == "X" and event["tid"] == main.get(rank):
        spans.setdefault(rank, []).append((event["ts"], event["ts"] + event["dur"], event["name"]))


def _of_rank(rank: int, label: str, spans: list[Span]) -> RankShares | None:
    start, stop = next(((start, stop) for start, stop, name in spans if name == RUNNING), (0.0, 0.0))
    inside = [span for span in spans if start <= span[0] and span[1] <= stop]
    if not inside:
        return None
    own = _own_times(inside)
    found = dict.fromkeys(NAMES, 0.0)
    for name, micros in own.items():
        found[KINDS.get(name, NAMES[-1])] += micros / (stop - start)
    return RankShares(
        rank=rank,
        label=label,
        secs=(stop - start) / 1e6,
        shares=found,
        microbatches=sum(name == FORWARD for _, _, name in inside),
    )


def _own_times(spans: Iterable[Span]) -> dict[str, float]:
    """By name, the time in spans less that in the spans within them."""
    own: dict[str, float] = {}
    around: list[Span] = []
    for start, stop, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while around and around[-1][1] <= start:
            around.pop()
        if around:
            own[around[-1][2]] -= stop - start
        own[name] = own.get(name, 0.0) + stop - start
        around.append((start, stop, name))
    return own
