"""Where time goes, of spans whose lengths are known."""

import json
from pathlib import Path

import pytest

from nemo_qwen_hidden.trace.record import MAIN
from nemo_qwen_hidden.trace.shares import NAMES, shares
from nemo_qwen_hidden.trace.whole import writing

Span = tuple[str, float, float]


def trace(path: Path, *ranks: list[Span]) -> Path:
    """Of each rank, spans of its main thread as name, start and end; another thread writes all the time."""
    with writing(path) as write:
        for rank, spans in enumerate(ranks):
            lines = [{"ph": "M", "name": "process_name", "tid": 0, "args": {"name": f"rank {rank}"}}]
            lines += [{"ph": "M", "name": "thread_name", "tid": 4, "args": {"name": MAIN}}]
            lines += [{"ph": "M", "name": "thread_name", "tid": 5, "args": {"name": "store writer"}}]
            lines += [{"ph": "X", "name": name, "tid": 4, "ts": a, "dur": b - a, "args": {}} for name, a, b in spans]
            lines += [{"ph": "X", "name": "write", "tid": 5, "ts": 0, "dur": 999, "args": {}}]
            write("".join(json.dumps({"pid": rank, **line}) + "\n" for line in lines).encode())
    return path


def test_time_counts_once_for_the_innermost_span(tmp_path: Path) -> None:
    spans = [
        ("loading weights", 0.0, 100.0),
        ("receive", 110.0, 130.0),
        ("encode", 145.0, 150.0),
        ("wait for disk", 150.0, 155.0),
        ("tap", 140.0, 160.0),
        ("forward", 130.0, 170.0),
        ("exchange", 170.0, 172.0),
        ("send", 180.0, 190.0),
        ("running", 100.0, 200.0),
        ("sealing", 200.0, 300.0),
    ]
    (found,) = shares(trace(tmp_path / "trace.json", spans))
    assert (found.rank, found.label, found.secs, found.microbatches) == (0, "rank 0", 100e-6, 1)
    expected = {"compute": 20, "copy": 10, "exchange": 2, "encode": 5, "peer": 30, "disk": 5, "other": 28}
    assert list(found.shares) == list(NAMES)
    assert found.shares == pytest.approx({name: percent / 100 for name, percent in expected.items()})


def test_a_rank_that_ran_nothing_is_left_out(tmp_path: Path) -> None:
    path = trace(tmp_path / "trace.json", [("sealing", 0.0, 9.0)], [("forward", 1.0, 3.0), ("running", 0.0, 4.0)])
    (found,) = shares(path)
    assert (found.rank, found.shares["compute"], found.shares["other"]) == (1, 0.5, 0.5)
