"""Signs of life of a rank, and the judgement of who is at fault when they stop.

A thread beside a rank's main thread makes a ``Beat`` every few seconds; ``Signs`` keeps what came of each rank, and
``judge`` says which rank is at fault. How beats travel is not known here: ``launch`` sends them through pipes to the
starter, ``peers`` through the store of torch.distributed. No torch here: the starter stays light.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

BEAT_SECS = 2.0
SILENT_SECS = 40.0
STILL_SECS = 40.0
BUSY_SHARE = 0.01
"""Of a processor: a main thread that uses less stands still, as one does that sleeps and looks, and sleeps again."""
STARVED_SHARE = 0.5
"""Of the time: a main thread that is ready for longer, and gets no processor, does not stand still."""
DOUBTFUL_BEATS = 3
PROCESSES, TASKS = Path("/proc"), Path("/proc/self/task")
MESSAGES = ("torch.distributed", "megatron.core")
"""Packages whose code, where a thread stands still in it, waits for a message: Megatron calls ``wait`` of a ``Work``,
which has no frame, from its own (``core/pipeline_parallel/p2p_communication.py``)."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """beat_secs: between two beats. silent_secs: without a beat, after which a rank counts as frozen. still_secs: for
    which a running main thread may stand still. The rest of a minute is for noticing and for ending all ranks."""

    beat_secs: float = BEAT_SECS
    silent_secs: float = SILENT_SECS
    still_secs: float = STILL_SECS

    @property
    def doubtful_secs(self) -> float:
        """Without a beat, after which a rank may be what the others wait for."""
        return DOUBTFUL_BEATS * self.beat_secs


LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank's main thread does. running: within ``Pulse.running``. still_secs: for how long it has neither
    worked nor come further. waits: for another rank. where: its place in the code, as ``sink (extract.py:120)``."""

    running: bool
    still_secs: float
    waits: bool
    where: str


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """The last beat of a rank, None before its first, and how long ago anything was heard of it."""

    silent_secs: float
    beat: Beat | None


def judge(sightings: Mapping[int, Sighting], limits: Limits) -> str | None:
    """Which rank is at fault and why, as a sentence; None where none is. ``sightings`` are those of all ranks that have
    not finished.

    A rank that waits for another is never at fault alone, and nobody is said to stand still while another rank may be
    frozen, since that is what it may wait for.
    """
    frozen = judge_silence(sightings, limits)
    if frozen or any(sighting.silent_secs >= limits.doubtful_secs for sighting in sightings.values()):
        return frozen
    still = {
        rank: sighting.beat
        for rank, sighting in sightings.items()
        if sighting.beat is not None and sighting.beat.still_secs >= limits.still_secs
    }
    ranks = sorted(still, key=lambda rank: still[rank].still_secs, reverse=True)
    for rank in ranks:
        if still[rank].running and not still[rank].waits:
            return f"rank {rank} has stood still for {still[rank].still_secs:.0f} s in {still[rank].where}"
    stuck = len(still) == len(sightings) and any(beat.running for beat in still.values())
    if stuck and all(beat.waits for beat in still.values()):
        first, least_secs = still[ranks[0]], still[ranks[-1]].still_secs
        where = f"rank {ranks[0]}, the first, in {first.where}"
        return f"all ranks have waited for each other for {least_secs:.0f} s, {where}"
    return None


def judge_silence(sightings: Mapping[int, Sighting], limits: Limits) -> str | None:
    """Which rank is frozen, as a sentence: the one that has been silent for longest; None where none is."""
    rank = max(sightings, key=lambda rank: sightings[rank].silent_secs, default=None)
    if rank is None or sightings[rank].silent_secs < limits.silent_secs:
        return None
    return f"rank {rank} has shown no sign of life for {sightings[rank].silent_secs:.0f} s"


class AwakeClock:
    """Seconds in which whoever asks was awake: of the time between two calls of ``now`` at most ``most_secs`` count.

    A process that was stopped (Ctrl-Z), or whose machine slept, must not take its own absence for that of others.
    """

    def __init__(self, most_secs: float) -> None:
        self._most_secs, self._last, self._now = most_secs, time.monotonic(), 0.0

    def now(self) -> float:
        """Not for several threads at once."""
        last, self._last = self._last, time.monotonic()
        self._now += min(self._last - last, self._most_secs)
        return self._now


class Signs:
    """What was heard of each rank and when, by the clock of who listens."""

    def __init__(self, ranks: Iterable[int], limits: Limits) -> None:
        self._clock = AwakeClock(2 * limits.beat_secs)
        self._heard: dict[int, tuple[float, Beat | None]] = {rank: (0.0, None) for rank in ranks}
        self._last_end: float | None = None

    def heard(self, rank: int, beat: Beat | None = None) -> None:
        """Something came from ``rank``, which has not finished: a beat, or something else (None)."""
        _, last = self._heard.get(rank, (0.0, None))
        self._heard[rank] = self._clock.now(), beat or last

    def finished(self, rank: int) -> None:
        """Nothing more is expected from ``rank``."""
        self._heard.pop(rank, None)
        self._last_end = self._clock.now()

    def sightings(self) -> dict[int, Sighting]:
        """Of the ranks that have not finished. What one of them has waited for may have come with the end of another,
        so that its standing still counts from there."""
        now = self._clock.now()
        most_secs = math.inf if self._last_end is None else now - self._last_end
        return {
            rank: Sighting(
                silent_secs=now - when,
                beat=beat and replace(beat, still_secs=min(beat.still_secs, most_secs)),
            )
            for rank, (when, beat) in self._heard.items()
        }


class Pulse:
    """Where a rank marks how far it is. Its methods are cheap and may be called from any thread; a pulse that nobody
    watches does nothing."""

    def __init__(self) -> None:
        self._mark, self._running = 0.0, False

    def progressed(self) -> None:
        """The rank has come further: a microbatch is done, some bytes are on the disk."""
        self._mark = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """While entered, which the main thread does, that thread may not stand still: neither compute, nor wait for a
        disk, nor for another thread (by ``wait_for_thread``) or a process of its own that does."""
        self._running = True
        self.progressed()
        try:
            yield
        finally:
            self._running = False

    @property
    def mark(self) -> tuple[float, bool]:
        """Changes with each call of ``progressed``; and whether ``running`` is entered."""
        return self._mark, self._running


class Waitable(Protocol):
    """As ``torch.distributed.Work``."""

    def wait(self) -> object: ...


def wait_for_peer(work: Waitable) -> None:
    """``work.wait()`` for a send or a receive that was posted earlier: in a function of its own, whose frame tells that
    the rank waits for another."""
    work.wait()


def wait_for_thread(thread: threading.Thread, wait: Callable[[], T]) -> T:
    """``wait()``, which returns when ``thread`` has done something: in a function of its own, whose frame tells that
    what counts meanwhile is what that thread does."""
    return wait()


class Observer:
    """Makes the beats of this process's main thread, from another thread."""

    def __init__(self, pulse: Pulse, limits: Limits) -> None:
        main = threading.main_thread()
        assert main.ident is not None and main.native_id is not None, "the main thread has been started"
        self._pulse, self._main, self._task = pulse, main.ident, TASKS / str(main.native_id)
        self._cpu_clock = time.pthread_getcpuclockid(main.ident)
        self._clock = AwakeClock(2 * limits.beat_secs)
        self._seen = self._look()
        self._still_secs = 0.0

    def beat(self) -> Beat:
        """What the main thread does now, and has done since the last call; where it waits for another thread, what that
        one does."""
        last, seen = self._seen, self._look()
        secs = seen.now - last.now
        worked = seen.work.keys() != last.work.keys() or any(
            work.cpu_secs - last.work[who].cpu_secs > BUSY_SHARE * secs or work.disk_bytes != last.work[who].disk_bytes
            for who, work in seen.work.items()
        )
        starved = seen.queued_secs - last.queued_secs > STARVED_SHARE * secs
        moved = worked or starved or seen.mark != last.mark or seen.wants
        self._still_secs = 0.0 if moved else self._still_secs + secs
        self._seen = seen
        # The frames of all threads are kept in no variable: this one's would then be in a cycle with it, and whatever
        # the main thread's hold, such as activations, would live until the collector comes.
        frame = sys._current_frames()[self._main]
        helper = _helper(frame)
        if helper is not None:
            frame = sys._current_frames().get(helper.ident or 0, frame)
        _, running = seen.mark
        return Beat(running=running, still_secs=self._still_secs, waits=_waits(frame), where=_where(frame))

    def _look(self) -> "_Seen":
        children = _descendants()
        work = {pid: _work_of(PROCESSES / str(pid)) for pid in children}
        work[0] = _Work(cpu_secs=time.clock_gettime(self._cpu_clock), disk_bytes=_disk_bytes(TASKS.parent))
        helper = _helper(sys._current_frames()[self._main])
        if helper is not None and helper.native_id is not None:
            work[helper.native_id] = _Work(cpu_secs=_cpu_secs(TASKS / str(helper.native_id)), disk_bytes=0)
        return _Seen(
            now=self._clock.now(),
            work=work,
            queued_secs=_queued_secs(self._task),
            wants=_in_state("D", TASKS) or any(_in_state("DR", PROCESSES / str(pid) / "task") for pid in children),
            mark=self._pulse.mark,
        )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Of a thread or a process, since it started: seconds of computing, and bytes that its disks have read or taken."""

    cpu_secs: float
    disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """work: of the main thread (0, with the bytes of the whole process), of the thread that it waits for, and of
    processes that this one has started, by their numbers. queued_secs: in which the main thread was ready to compute
    without a processor, since it started. wants: whether any thread of this process waits for a disk, or one of the
    other processes for a disk or a processor."""

    now: float
    work: Mapping[int, _Work]
    queued_secs: float
    wants: bool
    mark: tuple[float, bool]


def _work_of(process: Path) -> _Work:
    return _Work(cpu_secs=_cpu_secs(process), disk_bytes=_disk_bytes(process))


def _cpu_secs(entry: Path) -> float:
    """Of a process or a thread, from ``stat`` of its folder (proc(5)); 0 where it has just ended."""
    try:
        user, system = (entry / "stat").read_text().rpartition(")")[2].split()[11:13]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _disk_bytes(process: Path) -> int:
    """From ``io`` of its folder (proc(5)); 0 where it has just ended, or the kernel does not count them."""
    try:
        lines = (process / "io").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("read_bytes:", "write_bytes:")))


def _descendants() -> list[int]:
    """Processes that this one has started, and those that they have started; none where the kernel does not say it."""
    found: list[int] = []
    tasks = [TASKS]
    while tasks:
        for file in tasks.pop().glob("*/children"):
            with suppress(FileNotFoundError, ProcessLookupError):
                children = [int(child) for child in file.read_text().split()]
                found += children
                tasks += [PROCESSES / str(child) / "task" for child in children]
    return found


def _queued_secs(task: Path) -> float:
    """From sched-stats of the kernel (``Documentation/scheduler/sched-stats.rst``); 0 where it keeps none."""
    try:
        _, queued_ns, *_ = (task / "schedstat").read_text().split()
    except FileNotFoundError:
        return 0.0
    return int(queued_ns) / 1e9


def _in_state(states: str, tasks: Path) -> bool:
    """Whether any thread of a process is in one of these (proc(5)): D waits for a disk, R is ready to compute."""
    for stat in tasks.glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            if stat.read_text().rpartition(")")[2].split()[0] in states:
                return True
    return False


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _waits(innermost: FrameType) -> bool:
    return innermost.f_code is wait_for_peer.__code__ or _module(innermost).startswith(MESSAGES)


def _helper(innermost: FrameType) -> threading.Thread | None:
    """The thread that is waited for."""
    frame: FrameType | None = innermost
    while frame is not None and frame.f_code is not wait_for_thread.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["thread"]


def _where(innermost: FrameType) -> str:
    """The innermost frame outside the standard library, torch and this module."""
    frame: FrameType | None = innermost
    while frame is not None and (
        _module(frame) == __name__ or _module(frame).partition(".")[0] in {"torch", *sys.stdlib_module_names}
    ):
        frame = frame.f_back
    code, line = (frame or innermost).f_code, (frame or innermost).f_lineno
    return f"{code.co_name} ({Path(code.co_filename).name}:{line})"


@contextmanager
def beating(pulse: Pulse, tell: Callable[[Beat], None], limits: Limits) -> Iterator[None]:
    """While entered, a thread calls ``tell`` with a beat of the main thread, at once and then every ``beat_secs``."""
    observer, stop = Observer(pulse, limits), threading.Event()

    def beat() -> None:
        tell(observer.beat())
        while not stop.wait(limits.beat_secs):
            tell(observer.beat())

    thread = threading.Thread(target=beat, name="beats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
