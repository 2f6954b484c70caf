"""Numbers for people, tables at 80 columns, and a bar that adds up what several replicas say."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.progress import Progress as RichProgress

from nemo_qwen_hidden.cli.terminal import Bar, Terminal, duration, human
from nemo_qwen_hidden.progress import Phase, Progress

HUMAN = {
    0: "0",
    7: "7",
    3.14159: "3.14",
    99.96: "100",
    123.4: "123",
    999: "999",
    999.6: "1 k",
    1234: "1.23 k",
    12345: "12.3 k",
    999_600: "1 M",
    15_000_000_000: "15 G",
    10**19: "10 E",
    10**28: "10000 Y",
}


@pytest.mark.parametrize(("number", "text"), HUMAN.items())
def test_human(number: float, text: str) -> None:
    assert human(number) == text


DURATIONS = {
    0: "0 s",
    0.4: "0 s",
    59.4: "59 s",
    59.6: "1 min 00 s",
    65: "1 min 05 s",
    3600: "1 h 00 min",
    7265: "2 h 01 min",
    2 * 86400: "2.0 days",
    10**9: "11,574.1 days",
}


@pytest.mark.parametrize(("secs", "text"), DURATIONS.items())
def test_duration(secs: float, text: str) -> None:
    assert duration(secs) == text


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_tables_fit_and_take_text_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    with Terminal() as terminal:
        terminal.table([("store", "x" * 100), ("note", "[bold]not markup[/bold]")], "title")
        terminal.grid(("name", "value"), [("a", "1"), ("[red]b", "y" * 90)], "grid")
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("x") == 100
    assert "[bold]not markup[/bold]" in out
    assert "[red]b" in out


def test_quiet_keeps_results_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with Terminal(quiet=True) as terminal:
        with terminal.progress() as bar:
            bar(Phase("running"))
        terminal.note("a word")
        terminal.table([("rows", "3")], "extracted")
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "rows" in captured.out


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    shows = "from nemo_qwen_hidden.cli.terminal import Terminal\nwith Terminal() as it: it.grid(('a',), [('b',)], 'c')"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", shows], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_without_a_terminal_each_phase_is_a_line_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    with Terminal() as terminal, terminal.progress() as bar:
        for event in (Phase("loading weights"), Phase("loading weights"), Phase("running"), Progress(0, 5)):
            bar(event)
    assert capfd.readouterr() == ("", "loading weights\nrunning\n")


def test_output_survives_libraries_that_take_the_descriptors(capfd: pytest.CaptureFixture[str]) -> None:
    with Terminal() as terminal:
        saved = os.dup(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        terminal.table([("rows", "3")], "extracted")
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
    assert "rows" in capfd.readouterr().out


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(progress: RichProgress) -> str:
    """The bar as it stands on 80 columns."""
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(progress.get_renderable())
    return capture.get().rstrip()


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bar, RichProgress, Clock]]:
    clock = Clock()
    monkeypatch.setattr("rich.console.monotonic", clock)
    with Terminal() as terminal, terminal.progress() as bar:
        yield bar, bar._bar, clock


def test_the_bar_shows_speed_and_time_left(clocked: tuple[Bar, RichProgress, Clock]) -> None:
    bar, progress, clock = clocked
    bar(Phase("tokenizing"))
    clock.now += 3
    assert shown(progress).split("━ ")[-1].split() == ["3", "s"]
    bar.expect(rows=400_000, replicas=1)
    bar(Phase("running"))
    clock.now += 10
    bar(Progress(0, 100_000))
    line = shown(progress)
    assert line.startswith("running ")
    assert line.endswith("25 % 10 k tokens/s 30 s left")
    assert len(line) <= 80


def test_the_longest_line_fits(clocked: tuple[Bar, RichProgress, Clock]) -> None:
    bar, progress, clock = clocked
    bar.expect(rows=10**9, replicas=1)
    bar(Phase("loading weights"))
    clock.now += 11.3
    bar(Progress(0, 12_345))
    assert len(shown(progress).splitlines()) == 1
    assert shown(progress).endswith("0 % 1.09 k tokens/s 10.6 days left")


def test_replicas_add_up_and_those_unheard_of_are_taken_for_like(clocked: tuple[Bar, RichProgress, Clock]) -> None:
    bar, progress, clock = clocked
    bar.expect(rows=1000, replicas=4)
    bar(Phase("running"))
    clock.now += 1
    bar(Progress(0, 50))
    assert progress.tasks[0].completed == 200
    bar(Phase("running"))  # of a slower replica: the bar does not start again
    bar(Progress(1, 30))
    assert progress.tasks[0].completed == 160
    for replica in range(4):
        bar(Progress(replica, 250))
    assert progress.tasks[0].completed == 1000
    assert progress.tasks[0].total == 1000


def test_a_count_without_an_end(clocked: tuple[Bar, RichProgress, Clock]) -> None:
    bar, progress, clock = clocked
    clock.now += 2
    bar.count(5000)
    assert shown(progress).startswith("tokenizing ")
    assert shown(progress).endswith("5 k tokens 2.5 k tokens/s 2 s")
