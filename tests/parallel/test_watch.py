"""Who is judged to be at fault, of what was heard; and what a thread sees of the main thread. No ranks, no waiting."""

import gc
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden.parallel import watch
from nemo_qwen_hidden.parallel.watch import LIMITS, AwakeClock, Beat, Observer, Pulse, Sighting, Signs, judge

COMPUTES = Beat(running=True, still_secs=0.0, waits=False, where="forward (mlp.py:7)")
SLEEPS = replace(COMPUTES, still_secs=41.0, where="sink (extract.py:120)")
WAITS = replace(COMPUTES, still_secs=44.0, waits=True, where="_arrived (pipeline.py:181)")
LOADS = replace(COMPUTES, running=False, still_secs=300.0, where="read (tensors.py:40)")


def seen(*beats: Beat | None, silent: dict[int, float] | None = None) -> dict[int, Sighting]:
    silent_secs = silent or {}
    return {rank: Sighting(silent_secs=silent_secs.get(rank, 1.0), beat=beat) for rank, beat in enumerate(beats)}


INNOCENT = {
    "nobody": seen(),
    "computing": seen(COMPUTES, COMPUTES),
    "before the first beat": seen(None, None),
    "loading for minutes": seen(LOADS, LOADS),
    "waiting for one that computes": seen(COMPUTES, WAITS),
    "waiting for one that loads": seen(LOADS, WAITS),
    "waiting for one that has said nothing yet": seen(None, WAITS),
    "waiting, but only now": seen(WAITS, replace(WAITS, still_secs=39.0)),
    "still for less than the limit": seen(replace(SLEEPS, still_secs=39.0)),
    "still, but perhaps since another is frozen": seen(SLEEPS, COMPUTES, silent={1: 7.0}),
    "all wait, but one may be frozen": seen(WAITS, WAITS, silent={1: 39.0}),
    "all wait before anything runs": seen(replace(WAITS, running=False), replace(WAITS, running=False)),
}


@pytest.mark.parametrize("sightings", INNOCENT.values(), ids=INNOCENT)
def test_nobody_is_at_fault(sightings: dict[int, Sighting]) -> None:
    assert judge(sightings, LIMITS) is None


AT_FAULT = {
    "frozen": (seen(WAITS, COMPUTES, silent={1: 40.4}), "rank 1 has shown no sign of life for 40 s"),
    "frozen before its first beat": (seen(None, LOADS, silent={0: 41.0}), "rank 0 has shown no sign of life for 41 s"),
    "the one that froze first": (
        seen(*[COMPUTES] * 3, silent={1: 41.0, 2: 43.0}),
        "rank 2 has shown no sign of life for 43 s",
    ),
    "frozen, and one still": (seen(SLEEPS, WAITS, silent={1: 40.0}), "rank 1 has shown no sign of life for 40 s"),
    "still": (seen(WAITS, SLEEPS), "rank 1 has stood still for 41 s in sink (extract.py:120)"),
    "still while another replica works": (
        seen(COMPUTES, SLEEPS, LOADS),
        "rank 1 has stood still for 41 s in sink (extract.py:120)",
    ),
    "the one that has been still for longer": (
        seen(SLEEPS, replace(SLEEPS, still_secs=43.0, where="else (there.py:1)")),
        "rank 1 has stood still for 43 s in else (there.py:1)",
    ),
    "all wait": (
        seen(WAITS, replace(WAITS, still_secs=47.0)),
        "all ranks have waited for each other for 44 s, rank 1, the first, in _arrived (pipeline.py:181)",
    ),
    "waiting for one that has left": (
        seen(WAITS, replace(WAITS, running=False)),
        "all ranks have waited for each other for 44 s, rank 0, the first, in _arrived (pipeline.py:181)",
    ),
}


@pytest.mark.parametrize(("sightings", "said"), AT_FAULT.values(), ids=AT_FAULT)
def test_who_is_at_fault(sightings: dict[int, Sighting], said: str) -> None:
    assert judge(sightings, LIMITS) == said


def test_the_limits_leave_time_to_end_within_a_minute() -> None:
    """Up to two beats until the fault is noticed, two for the others to hear of it, and some seconds for ending."""
    assert max(LIMITS.silent_secs, LIMITS.still_secs) + 5 * LIMITS.beat_secs + 6 < 60


class Time:
    """Stands in for ``time``: it goes on when told to."""

    def __init__(self) -> None:
        self.secs, self.cpu_secs = 1000.0, 5.0

    def monotonic(self) -> float:
        return self.secs

    def pthread_getcpuclockid(self, ident: int) -> int:
        assert ident == threading.main_thread().ident
        return 17

    def clock_gettime(self, clock: int) -> float:
        assert clock == 17
        return self.cpu_secs

    def pass_(self, secs: float, *, cpu_secs: float = 0.0) -> None:
        self.secs, self.cpu_secs = self.secs + secs, self.cpu_secs + cpu_secs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    stand_in = Time()
    monkeypatch.setattr(watch, "time", stand_in)
    return stand_in


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """Threads of this process as the kernel would show them: all asleep."""
    monkeypatch.setattr(watch, "TASKS", tmp_path / "self" / "task")
    monkeypatch.setattr(watch, "PROCESSES", tmp_path)
    main = str(threading.main_thread().native_id)
    found = {"main": watch.TASKS / main, "helper": watch.TASKS / "999999999", "child": tmp_path / "71/task/71"}
    for task in found.values():
        task.mkdir(parents=True)
        (task / "stat").write_text("1 (a (strange) D name) S 1 2 3")
    (found["main"] / "children").write_text("70 71 ")  # 70 has just ended
    show_child(tmp_path)
    return found


def show_child(processes: Path, *, ticks: int = 400, written: int = 0) -> None:
    """What the kernel says of a child that the main thread has started."""
    (processes / "71/stat").write_text(f"71 (a child) S 1 2 3 4 5 6 7 8 9 10 {ticks - 100} 100 0 0")
    (processes / "71/io").write_text(f"rchar: 9\nwchar: 10\nread_bytes: 0\nwrite_bytes: {written}\n")


def test_time_in_which_the_listener_was_stopped_does_not_count(clock: Time) -> None:
    awake = AwakeClock(4.0)
    clock.pass_(3.0)
    assert awake.now() == 3.0
    clock.pass_(500.0)
    assert awake.now() == 7.0


def test_anything_heard_is_a_sign_of_life(clock: Time) -> None:
    signs = Signs(range(2), LIMITS)
    clock.pass_(2.0)
    signs.heard(0, SLEEPS)
    clock.pass_(2.0)
    signs.heard(0)
    clock.pass_(1.0)
    assert signs.sightings() == {0: Sighting(silent_secs=1.0, beat=SLEEPS), 1: Sighting(silent_secs=5.0, beat=None)}
    signs.finished(0)
    assert signs.sightings().keys() == {1}


def test_standing_still_counts_from_the_end_of_another_rank(clock: Time) -> None:
    """It may have waited for that one, and got what it waited for with its end."""
    signs = Signs(range(2), LIMITS)
    clock.pass_(1.0)
    signs.heard(1, replace(SLEEPS, still_secs=100.0))
    signs.finished(0)
    clock.pass_(2.0)
    beat = signs.sightings()[1].beat
    assert beat is not None and beat.still_secs == 2.0


def test_a_beat_keeps_nothing_of_the_main_thread_alive() -> None:
    """Such as activations, which would otherwise be there until the collector of cycles comes."""
    observer = Observer(Pulse(), LIMITS)

    class Activation:
        pass

    def work() -> weakref.ref[Activation]:
        activation = Activation()
        thread = threading.Thread(target=observer.beat)
        thread.start()
        thread.join()
        return weakref.ref(activation)

    gc.disable()
    try:
        assert work()() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("tasks")
def test_a_main_thread_stands_still_until_it_computes(clock: Time) -> None:
    observer = Observer(Pulse(), LIMITS)
    found = []
    for cpu_secs in (0.0, 0.0, 0.01, 0.5, 0.0):
        clock.pass_(2.0, cpu_secs=cpu_secs)
        found.append(observer.beat().still_secs)
    assert found == [2.0, 4.0, 6.0, 0.0, 2.0]


@pytest.mark.usefixtures("tasks")
def test_progress_of_any_thread_is_no_standing_still(clock: Time) -> None:
    pulse = Pulse()
    observer = Observer(pulse, LIMITS)
    clock.pass_(2.0)
    assert observer.beat().still_secs == 2.0
    clock.pass_(1.0)
    thread = threading.Thread(target=pulse.progressed)
    thread.start()
    thread.join()
    clock.pass_(1.0)
    assert observer.beat().still_secs == 0.0
    with pulse.running():
        clock.pass_(2.0)
        assert observer.beat().running
    assert not observer.beat().running


@pytest.mark.parametrize(
    ("which", "state", "still"),
    [
        ("main", "D", 0.0),
        ("helper", "D", 0.0),
        ("child", "D", 0.0),
        ("child", "R", 0.0),
        ("main", "S", 2.0),
        ("helper", "R", 2.0),
        ("child", "S", 2.0),
    ],
)
def test_waiting_for_a_disk_is_no_standing_still(
    clock: Time, tasks: dict[str, Path], which: str, state: str, still: float
) -> None:
    observer = Observer(Pulse(), LIMITS)
    (tasks[which] / "stat").write_text(f"1 (a (strange) S name) {state} 1 2 3")
    clock.pass_(2.0)
    assert observer.beat().still_secs == still


def test_waiting_for_a_processor_is_no_standing_still(clock: Time, tasks: dict[str, Path]) -> None:
    observer, found = Observer(Pulse(), LIMITS), []
    for queued_secs in (0.1, 1.9, 2.0):
        (tasks["main"] / "schedstat").write_text(f"5000 {queued_secs * 1e9:.0f} 3\n")
        clock.pass_(2.0)
        found.append(observer.beat().still_secs)
    assert found == [2.0, 0.0, 2.0]


def test_what_a_child_does_is_no_standing_still(clock: Time, tasks: dict[str, Path], tmp_path: Path) -> None:
    """As those do that write a checkpoint for Megatron: they compute or write, or are there no more."""
    observer, found = Observer(Pulse(), LIMITS), []
    second = os.sysconf("SC_CLK_TCK")
    for ticks, written in ((400, 0), (400 + second, 0), (400 + second, 4096), (400 + second, 4096)):
        show_child(tmp_path, ticks=ticks, written=written)
        clock.pass_(2.0)
        found.append(observer.beat().still_secs)
    (tasks["main"] / "children").write_text("")
    found.append(observer.beat().still_secs)
    assert found == [2.0, 0.0, 0.0, 2.0, 0.0]


def test_what_the_process_writes_is_no_standing_still(clock: Time, tasks: dict[str, Path]) -> None:
    observer, found = Observer(Pulse(), LIMITS), []
    for written in (0, 8192, 8192):
        (watch.TASKS.parent / "io").write_text(f"read_bytes: 0\nwrite_bytes: {written}\n")
        clock.pass_(2.0)
        found.append(observer.beat().still_secs)
    assert found == [2.0, 0.0, 2.0]


class Work:
    """Whose ``wait`` has no frame of its own, like that of ``torch.distributed.Work``."""

    def __init__(self, lock: threading.Lock) -> None:
        self.wait = lock.acquire


def in_megatron(work: Work) -> None:
    """As its pipeline waits for a message that was posted before."""
    own: dict[str, Any] = {"__name__": "megatron.core.pipeline_parallel.p2p_communication"}
    exec("def wait(work):\n    work.wait()", own)
    own["wait"](work)


def in_a_thread(work: Work) -> None:
    thread = threading.Thread(target=watch.wait_for_peer, args=(work,))
    thread.start()
    watch.wait_for_thread(thread, thread.join)


WAYS: dict[str, tuple[Callable[[Work], object], bool, str]] = {
    "for a peer": (watch.wait_for_peer, True, r"test_a_beat_says_where_the_main_thread_waits \(test_watch.py:\d+\)"),
    "for a peer in Megatron": (in_megatron, True, r"wait \(<string>:2\)"),
    "for a thread that waits for a peer": (in_a_thread, True, r"wait_for_peer \(watch.py:\d+\)|.*threading.*"),
    "for something else": (lambda work: work.wait(), False, r"<lambda> \(test_watch.py:\d+\)"),
}


@pytest.mark.parametrize(("wait", "for_peer", "where"), WAYS.values(), ids=WAYS)
def test_a_beat_says_where_the_main_thread_waits(wait: Callable[[Work], object], for_peer: bool, where: str) -> None:
    """A helper lets the main thread go after a look at it."""
    observer, lock, beats = Observer(Pulse(), LIMITS), threading.Lock(), []

    def look() -> None:
        time.sleep(0.2)
        beats.append(observer.beat())
        lock.release()

    lock.acquire()
    thread = threading.Thread(target=look)
    thread.start()
    wait(Work(lock))
    thread.join()
    assert beats[0].waits == for_peer
    assert re.fullmatch(where, beats[0].where)


def test_the_standard_library_is_nobodys_place() -> None:
    observer, going, beats = Observer(Pulse(), LIMITS), threading.Event(), []

    def look() -> None:
        time.sleep(0.2)
        beats.append(observer.beat())
        going.set()

    thread = threading.Thread(target=look)
    thread.start()
    going.wait()
    thread.join()
    assert beats[0].where.startswith("test_the_standard_library_is_nobodys_place (test_watch.py:")
