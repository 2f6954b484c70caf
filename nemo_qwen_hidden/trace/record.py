"""Spans and counters of one rank.

Code that can be traced takes a ``Trace``; where nobody asked for one that is ``UNTRACED``, which does nothing.
"""

import json
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nemo_qwen_hidden.errors import ConfigError

SETTING = "profile.trace"
MOST_HELD = 4096
"""Events in memory, before they go to the file."""
MAIN = "main loop"

_NOTHING = nullcontext()
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Trace:
    """Records nothing."""

    def span(self, name: str, **args: Any) -> AbstractContextManager[None]:
        """While entered, the calling thread does ``name``. Spans of a thread lie within or beside each other.

        args: are shown with the span; what is no number, as text.
        """
        return _NOTHING

    def count(self, name: str, value: int) -> None:
        """The value of something from now on, which is shown as a curve."""


UNTRACED = Trace()


@dataclass(frozen=True, kw_only=True)
class Clock:
    """One moment. machine: the same in all processes of a machine until it boots. steady_ns: by the clock of spans
    (CLOCK_MONOTONIC), which they share. unix_ns: by the clock that machines share, more or less."""

    machine: str
    steady_ns: int
    unix_ns: int

    @classmethod
    def now(cls) -> Self:
        return cls(machine=_BOOT.read_text().strip(), steady_ns=time.perf_counter_ns(), unix_ns=time.time_ns())


def zero_of(machine: str, clocks: Sequence[Clock]) -> int:
    """What the steady clock of a machine shows at time 0 of the trace, the moment of the first of ``clocks``: all ranks
    of a machine agree on it, whenever they looked."""
    first = next(clock for clock in clocks if clock.machine == machine)
    return first.steady_ns + clocks[0].unix_ns - first.unix_ns


class Recorder(Trace):
    """Records into a file of its own, which has no name and is gone with the process: one event of the trace a line.

    Args:
        rank, label: of this process. zero_ns: what the steady clock shows here at time 0 of the trace.

    A context manager: it closes. Spans may come from any thread.
    """

    def __init__(self, *, rank: int, label: str, zero_ns: int) -> None:
        self._rank, self._zero_ns = rank, zero_ns
        self._lock = threading.Lock()
        self._threads: dict[tuple[int, str], int] = {}
        self._held: list[dict[str, Any]] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._add("M", "process_name", args={"name": label})
        self._add("M", "process_sort_index", args={"sort_index": rank})

    def span(self, name: str, **args: Any) -> AbstractContextManager[None]:
        return _Span(self, name, args)

    def count(self, name: str, value: int) -> None:
        self._add("C", name, ts=self._micros(time.perf_counter_ns()), args={name: value})

    def ended(self, name: str, args: dict[str, Any], start_ns: int, stop_ns: int) -> None:
        """A span of the calling thread has ended."""
        self._add("X", name, ts=self._micros(start_ns), dur=(stop_ns - start_ns) / 1000, args=args)

    def rewind(self) -> None:
        """Nothing more is recorded; ``lines`` begins with the first event."""
        with self._lock:
            self._flush()
        self._file.seek(0)

    def lines(self, size_bytes: int) -> bytes:
        """The next whole lines, about so many bytes; none at the end."""
        return b"".join(self._file.readlines(size_bytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _micros(self, now_ns: int) -> float:
        return (now_ns - self._zero_ns) / 1000

    def _add(self, kind: str, name: str, **fields: Any) -> None:
        with self._lock:
            self._held.append({"ph": kind, "name": name, "pid": self._rank, "tid": self._thread(), **fields})
            if len(self._held) >= MOST_HELD:
                self._flush()

    def _thread(self) -> int:
        """The number of the calling thread in the trace. The system gives a thread's identity to another when it has
        ended, but not its name."""
        thread = threading.current_thread()
        key = threading.get_ident(), thread.name
        if key not in self._threads:
            number = self._threads[key] = len(self._threads)
            name = MAIN if thread is threading.main_thread() else thread.name
            self._held.append(
                {"ph": "M", "name": "thread_name", "pid": self._rank, "tid": number, "args": {"name": name}}
            )
        return self._threads[key]

    def _flush(self) -> None:
        text = "".join(json.dumps(event, separators=(",", ":"), default=str) + "\n" for event in self._held)
        self._held.clear()
        try:
            self._file.write(text.encode())
            self._file.flush()
        except OSError as error:
            rule = f"must find room for what is recorded in {tempfile.gettempdir()} ({error.strerror})"
            raise ConfigError(SETTING, rule, None) from error


class _Span(AbstractContextManager[None]):
    __slots__ = ("_args", "_name", "_recorder", "_start_ns")

    def __init__(self, recorder: Recorder, name: str, args: dict[str, Any]) -> None:
        self._recorder, self._name, self._args = recorder, name, args

    def __enter__(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._recorder.ended(self._name, self._args, self._start_ns, time.perf_counter_ns())
