"""What a person sees: a progress bar and tables.

Keeps file descriptors of its own, since libraries get a log file for the process's while a job runs.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from nemo_qwen_hidden.progress import Event, Phase

SI = ("", "k", "M", "G", "T", "P")


def human(number: float) -> str:
    """Three significant digits with an SI prefix: 12345 is ``12.3 k``."""
    power = 0
    while abs(number) >= 999.5 and power < len(SI) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.0f}" if abs(number) >= 99.95 or number == int(number) else f"{number:.3g}"
    return f"{digits} {SI[power]}".rstrip()


def duration(secs: float) -> str:
    """``4.2 s``, ``1:05`` minutes, ``2:01:05`` hours."""
    if secs < 59.95:
        return f"{secs:.1f} s"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Terminal:
    """stdout for results, stderr for progress; ``quiet`` shows results alone. A context manager: it closes."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._files = [os.fdopen(os.dup(descriptor), "w", encoding="utf-8") for descriptor in (1, 2)]
        self._out, self._err = (Console(file=file, highlight=False) for file in self._files)
        self._quiet = quiet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def note(self, message: str) -> None:
        """A line on stderr, however narrow the terminal."""
        if not self._quiet:
            self._err.print(message, markup=False, soft_wrap=True)

    def table(self, rows: Iterable[tuple[str, str]], title: str) -> None:
        """Labels and values."""
        table = _table(title, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in rows:
            table.add_row(label, Text(value))
        self._out.print(table)

    def grid(self, header: Iterable[str], rows: Iterable[Iterable[str]], title: str) -> None:
        """A table with a header."""
        table = _table(title, show_header=True)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self._out.print(table)

    @contextmanager
    def progress(self) -> Iterator["Bar"]:
        """A bar over a number of rows that is not known yet."""
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), _Done(), _Speed(), _Left())
        with Progress(*columns, console=self._err, disable=self._quiet or not self._err.is_terminal) as bar:
            yield Bar(bar, bar.add_task("starting", total=None), self)


class Bar:
    """Takes a job's events."""

    def __init__(self, bar: Progress, task: TaskID, terminal: Terminal) -> None:
        self._bar, self._task, self._terminal = bar, task, terminal
        self._rows: dict[int, int] = {}
        self._total: int | None = None
        self._replicas = 1
        self._phases: set[str] = set()

    def expect(self, *, rows: int, replicas: int) -> None:
        """How many rows there are, and how many replicas there are beside those that this process hears from."""
        self._total, self._replicas = rows, replicas

    def count(self, rows: int) -> None:
        """Rows so far, of a number that is not known yet."""
        self._bar.update(self._task, description="tokenizing", completed=rows)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Phase):
            self._begin(event.text)
            return
        if not self._rows:
            self._bar.reset(self._task, total=self._total)
        self._rows[event.replica] = event.rows
        heard = sum(self._rows.values()) * self._replicas // len(self._rows)
        self._bar.update(self._task, completed=heard)

    def _begin(self, phase: str) -> None:
        """A phase counts when the first replica gets there."""
        if phase in self._phases:
            return
        self._phases.add(phase)
        self._bar.reset(self._task, description=phase, total=None)
        if self._bar.disable:
            self._terminal.note(phase)


class _Done(ProgressColumn):
    """Rows of all rows, which are tokens."""

    def render(self, task: Task) -> Text:
        if not task.completed:
            return Text()
        if task.total is None:
            return Text(f"{human(task.completed)} tokens")
        return Text(f"{task.percentage:3.0f} % of {human(task.total)} tokens")


class _Speed(ProgressColumn):
    """Rows of each second since the first."""

    def render(self, task: Task) -> Text:
        speed = _speed(task)
        return Text(f"{human(speed)}/s" if speed else "")


class _Left(ProgressColumn):
    """Time passed, or time left where the number of rows is known."""

    def render(self, task: Task) -> Text:
        elapsed, speed = task.elapsed or 0.0, _speed(task)
        if task.total is None or not speed:
            return Text(duration(int(elapsed)).replace(".0", ""))
        return Text(f"{duration(int((task.total - task.completed) / speed)).replace('.0', '')} left")


def _speed(task: Task) -> float:
    return task.completed / task.elapsed if task.elapsed else 0.0


def _table(title: str, *, show_header: bool) -> Table:
    return Table(title=title, title_justify="left", show_header=show_header, box=None, padding=(0, 2, 0, 0))
