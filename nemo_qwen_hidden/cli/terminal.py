"""What a person sees: a progress bar and tables.

Keeps file descriptors of its own, since libraries get a log file for the process's while a job runs.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from nemo_qwen_hidden.cli import PROGRAM
from nemo_qwen_hidden.progress import Event, Phase

SI = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def human(number: float) -> str:
    """Three significant digits with an SI prefix: 12345 is ``12.3 k``."""
    power = 0
    while abs(number) >= 999.5 and power < len(SI) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.0f}" if abs(number) >= 99.95 or number == int(number) else f"{number:.3g}"
    return f"{digits} {SI[power]}".rstrip()


def duration(secs: float) -> str:
    """``12 s``, ``1 min 05 s``, ``2 h 01 min``, ``3.1 days``."""
    whole = round(secs)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole >= 2 * 86400:
        return f"{secs / 86400:,.1f} days"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


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
            with suppress(BrokenPipeError):  # who reads them may have seen enough: `... | head`
                file.close()

    def note(self, message: str) -> None:
        """A line on stderr, however narrow the terminal."""
        if not self._quiet:
            self._err.print(message, markup=False, soft_wrap=True)

    def error(self, message: str) -> None:
        """A line on stderr for each problem, even where the rest is quiet."""
        for line in message.splitlines():
            self._err.print(f"{PROGRAM}: {line}", markup=False, soft_wrap=True)

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

    def line(self, text: str) -> None:
        """A line of the result, however narrow the terminal: to be copied whole."""
        self._out.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bytes_progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar over bytes, which takes those that are done and all there are; gone afterwards."""
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), _Done(), _BytesSpeed(), _Time())
        silent = self._quiet or not self._err.is_terminal
        with Progress(*columns, console=self._err, disable=silent, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def progress(self) -> Iterator["Bar"]:
        """A bar over a number of rows that is not known yet; gone afterwards."""
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), _Done(), _Speed(), _Time())
        silent = self._quiet or not self._err.is_terminal
        with Progress(*columns, console=self._err, disable=silent, transient=True) as bar:
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
        self._rows[event.replica] = event.rows
        heard = sum(self._rows.values()) * self._replicas // len(self._rows)
        self._bar.update(self._task, completed=heard, total=self._total)

    def _begin(self, phase: str) -> None:
        """A phase counts when the first replica gets there."""
        if phase in self._phases:
            return
        self._phases.add(phase)
        self._bar.reset(self._task, description=phase, total=None)
        if self._bar.disable:
            self._terminal.note(phase)


class _Done(ProgressColumn):
    """Rows, which are tokens, so far; as a part of all where their number is known."""

    def render(self, task: Task) -> Text:
        if task.total is not None:
            return Text(f"{int(task.percentage)} %")
        return Text(f"{human(task.completed)} tokens" if task.completed else "")


class _Speed(ProgressColumn):
    """Rows of each second of this phase."""

    def render(self, task: Task) -> Text:
        return Text(f"{human(_speed(task))} tokens/s" if task.completed else "")


class _BytesSpeed(ProgressColumn):
    """Bytes of each second."""

    def render(self, task: Task) -> Text:
        return Text(f"{human(_speed(task))}B/s" if task.completed else "")


class _Time(ProgressColumn):
    """Time left where the number of rows is known, else time passed."""

    def render(self, task: Task) -> Text:
        if task.total is None or not task.completed:
            return Text(duration(task.elapsed or 0))
        return Text(f"{duration((task.total - task.completed) / _speed(task))} left")


def _speed(task: Task) -> float:
    return task.completed / max(task.elapsed or 0, 1e-9)


def _table(title: str, *, show_header: bool) -> Table:
    return Table(title=title, title_justify="left", show_header=show_header, box=None, padding=(0, 2, 0, 0))
