"""One rank's record, and the file."""

import json
import threading
from pathlib import Path

import pytest

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.trace import record
from nemo_qwen_hidden.trace.record import MAIN, UNTRACED, Clock, Recorder, Trace, zero_of
from nemo_qwen_hidden.trace.shares import shares
from nemo_qwen_hidden.trace.whole import TEMPORARY, check_place, clear_place, events, writing


def recorder(rank: int = 0) -> Recorder:
    now = Clock.now()
    return Recorder(rank=rank, label=f"rank {rank}", zero_ns=zero_of(now.machine, [now]))


def made(path: Path, *recorders: Recorder) -> Path:
    with writing(path) as write:
        for each in recorders:
            each.rewind()
            while lines := each.lines(50):
                write(lines)
    return path


def test_untraced_does_nothing() -> None:
    assert type(UNTRACED) is Trace and vars(UNTRACED) == {}
    assert UNTRACED.span("one", bytes=1) is UNTRACED.span("two")
    with UNTRACED.span("one"), UNTRACED.span("two"):
        UNTRACED.count("queued bytes", 1)
    assert vars(UNTRACED) == {}


def test_spans_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_HELD", 2)
    with recorder(3) as trace:

        def work() -> None:
            with trace.span("write", bytes=5):
                trace.count("queued bytes", 7)

        with trace.span("outer", hook_point=Path("text")), trace.span("inner"):
            thread = threading.Thread(target=work, name="disk")
            thread.start()
            thread.join()
        path = made(tmp_path / "trace.json", trace)
    found = json.loads(path.read_text())["traceEvents"]
    assert found == list(events(path))
    assert {event["pid"] for event in found} == {3}
    threads = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    spans = {event["name"]: event for event in found if event["ph"] == "X"}
    assert {name: threads[span["tid"]] for name, span in spans.items()} == {
        "outer": MAIN,
        "inner": MAIN,
        "write": "disk",
    }
    assert spans["write"]["args"] == {"bytes": 5} and spans["outer"]["args"] == {"hook_point": "text"}
    starts = [spans[name]["ts"] for name in ("outer", "inner", "write")]
    ends = [spans[name]["ts"] + spans[name]["dur"] for name in ("write", "inner", "outer")]
    assert starts == sorted(starts) and ends == sorted(ends) and starts[-1] <= ends[0]
    (count,) = (event for event in found if event["ph"] == "C")
    assert count["args"] == {"queued bytes": 7} and starts[-1] <= count["ts"] <= ends[0]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_HELD", 10)
    with recorder() as trace:
        for number in range(1000):
            trace.count("number", number)
            assert len(trace._held) < 10
        trace.rewind()
        lines = trace.lines(10**9).splitlines()
    counted = [event["args"]["number"] for event in map(json.loads, lines) if event["ph"] == "C"]
    assert counted == list(range(1000))


def test_machines_are_brought_to_one_clock() -> None:
    clocks = [
        Clock(machine="a", steady_ns=100, unix_ns=1_000_000),
        Clock(machine="a", steady_ns=130, unix_ns=1_000_031),  # unix time is read a little later
        Clock(machine="b", steady_ns=7_000, unix_ns=1_000_010),
        Clock(machine="b", steady_ns=7_025, unix_ns=1_000_034),
    ]
    assert zero_of("a", clocks) == 100
    assert zero_of("b", clocks) == 6_990


def test_a_file_that_is_not_finished_has_no_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(KeyError), writing(path) as write:
        write(b'{"ph":"M"}\n')
        assert [file.name for file in tmp_path.iterdir()] == [path.name + TEMPORARY]
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_trace_goes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.json"
    clear_place(path)
    path.write_text("old")
    clear_place(path)
    assert list(path.parent.iterdir()) == []


def test_places_that_are_refused(tmp_path: Path) -> None:
    check_place(tmp_path / "a" / "b" / "trace.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"`profile.trace` must be a file, and no folder"):
        check_place(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`profile.trace` must lie in a folder that can be made and written"):
        check_place(tmp_path / "file" / "trace.json")


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": []}'])
def test_another_file_is_no_trace(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"must be a file that `profile.trace` has made"):
        shares(path)


def test_a_cut_file_is_no_trace(tmp_path: Path) -> None:
    with recorder() as trace:
        path = made(tmp_path / "trace.json", trace)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="must be a whole file"):
        shares(path)
