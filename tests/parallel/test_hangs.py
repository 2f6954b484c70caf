"""Ranks that hang and are ended by their starter, ranks that only seem to, and ranks whose starter is gone."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from nemo_qwen_hidden.errors import RankError
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks
from nemo_qwen_hidden.parallel.watch import Limits, wait_for_peer, wait_for_thread
from tests.parallel.helpers import Listener, all_end, exists

ROOT = Path(__file__).parents[2]
LONG_SECS = 60.0
LIMITS = Limits(beat_secs=0.15, silent_secs=3.0, still_secs=1.5)
PATIENT = replace(LIMITS, silent_secs=LONG_SECS)  # of a busy machine


class Message:
    """Whose ``wait`` has no frame of its own, like that of ``torch.distributed.Work``."""

    def __init__(self, *, comes_after_secs: float) -> None:
        lock = threading.Lock()
        lock.acquire()
        self.wait = partial(lock.acquire, timeout=comes_after_secs)


def hang(rank: Rank, what: Sequence[str]) -> None:
    """Each rank does what ``what`` has for it, while it runs."""
    rank.send(os.getpid())
    with rank.pulse.running():
        if what[rank.rank] == "freezes":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what[rank.rank] == "sleeps":
            time.sleep(LONG_SECS)
        elif what[rank.rank] == "sleeps again and again":
            while True:
                time.sleep(0.1)
        elif what[rank.rank] == "sleeps in a thread":
            thread = threading.Thread(target=time.sleep, args=(LONG_SECS,), daemon=True)
            thread.start()
            wait_for_thread(thread, thread.join)
        elif what[rank.rank] == "waits":
            wait_for_peer(Message(comes_after_secs=LONG_SECS))


HANGS = {
    "frozen": (("waits", "freezes"), r"rank 1 has shown no sign of life for \d s"),
    "still": (("waits", "sleeps"), r"rank 1 has stood still for \d s in hang \(test_hangs.py:\d+\)"),
    "polling": (("sleeps again and again",), r"rank 0 has stood still for \d s in hang \(test_hangs.py:\d+\)"),
    "still in a thread": (("waits", "sleeps in a thread"), r"rank 1 has stood still for \d s in .*"),
    "all wait": (("waits", "waits"), r"all ranks have waited for each other for \d s, rank \d, the first, in hang .*"),
}


@pytest.mark.parametrize(("what", "said"), HANGS.values(), ids=HANGS)
def test_a_rank_that_hangs_ends_all(log: Path, what: tuple[str, ...], said: str) -> None:
    listener = Listener()
    with pytest.raises(RankError) as caught:
        limits = LIMITS if "freezes" in what else PATIENT
        run_ranks(hang, (what,), world=len(what), log=log, on_event=listener, limits=limits)
    assert re.fullmatch(said, str(caught.value))
    assert len(listener.events) == len(what) and listener.none_is_alive()


def take_long(rank: Rank) -> int:
    """Longer than a hanging rank may: rank 0 computes, 1 is held up by a slow disk, 2 loads; 3 waits for them."""
    end = time.monotonic() + 2 * LIMITS.still_secs
    if rank.rank == 2:
        time.sleep(end - time.monotonic())
        return rank.rank
    with rank.pulse.running():
        if rank.rank == 0:
            compute_until(end)
        if rank.rank == 1:
            writer = threading.Thread(target=write_slowly, args=(rank, end))
            writer.start()
            writer.join()
        if rank.rank == 3:
            wait_for_peer(Message(comes_after_secs=end - time.monotonic()))
    return rank.rank


def compute_until(end: float) -> None:
    while time.monotonic() < end:
        pass


def write_slowly(rank: Rank, end: float) -> None:
    while time.monotonic() < end:
        time.sleep(LIMITS.still_secs / 3)
        rank.pulse.progressed()


def test_what_takes_long_does_not_hang(log: Path) -> None:
    assert run_ranks(take_long, world=4, log=log, limits=PATIENT) == [0, 1, 2, 3]


def have_it_done(rank: Rank) -> int:
    """Rank 0 waits for a process of its own that computes; the others for a thread, of 1 one that computes, of 2 one
    that waits for other ranks."""
    end = time.monotonic() + 2 * LIMITS.still_secs
    with rank.pulse.running():
        if rank.rank == 0:
            child = os.fork()
            if child == 0:
                compute_until(end)
                os._exit(0)
            os.waitpid(child, 0)
        else:
            message = Message(comes_after_secs=end - time.monotonic())
            work = partial(compute_until, end) if rank.rank == 1 else partial(wait_for_peer, message)
            thread = threading.Thread(target=work)
            thread.start()
            wait_for_thread(thread, thread.join)
    return rank.rank


def test_who_waits_for_its_own_thread_or_process_does_not_hang(log: Path) -> None:
    assert run_ranks(have_it_done, world=3, log=log, limits=PATIENT) == [0, 1, 2]


STARTER = """
import sys
from pathlib import Path
from nemo_qwen_hidden.parallel import launch
from tests.parallel import test_hangs
if __name__ == "__main__":
    launch.PRELOAD = ()
    print_pid = lambda rank, pid: print(pid, flush=True)
    launch.run_ranks(test_hangs.stay, world=2, log=Path(sys.argv[1]), on_event=print_pid, limits=test_hangs.LIMITS)
"""


def stay(rank: Rank) -> None:
    rank.send(os.getpid())
    time.sleep(LONG_SECS)


def test_ranks_outlive_a_pause_of_all_but_not_their_starter(log: Path) -> None:
    """A pause as by Ctrl-Z, for longer than a rank may be frozen; then the starter is killed."""
    command = [sys.executable, "-c", STARTER, str(log)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as starter:
        try:
            assert starter.stdout is not None
            ranks = [int(starter.stdout.readline()) for _ in range(2)]
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for pid in (starter.pid, *ranks):
                    os.kill(pid, number)
                time.sleep(1.25 * LIMITS.silent_secs if number == signal.SIGSTOP else 5 * LIMITS.beat_secs)
            assert starter.poll() is None and all(map(exists, ranks))
        finally:
            starter.kill()
    assert all_end(ranks)
