"""Ranks that a launcher such as torchrun has started watch each other through the store of torch.distributed.

Every rank posts its beats. Rank 0 judges all ranks, and the others judge whether rank 0 is frozen, so that the traffic
grows with the number of ranks and not with its square. An operation on a TCPStore whose host is frozen never returns,
whatever its timeout (torch 2.13: it bounds the wait for a key, not the one for an answer), so a second thread watches
the one that talks to the store.
"""

import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from nemo_qwen_hidden.parallel.launch import launched_local_rank
from nemo_qwen_hidden.parallel.watch import (
    LIMITS,
    AwakeClock,
    Beat,
    Limits,
    Observer,
    Pulse,
    Signs,
    judge,
    judge_silence,
)

SAYING_SECS = 3.0
MOST_LOST = 2
PREFIX = "nemo_qwen_hidden/"

Say = Callable[[str], None]
Process = tuple[str, int]  # the name of its machine and its number there


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where ranks meet, and which of how many this one is."""

    store: Store
    rank: int
    world: int


def meet() -> Meeting:
    """Of the ranks that a launcher has started, before they are a process group; that may be made with its store."""
    store, rank, world = next(rendezvous("env://"))
    return Meeting(store=store, rank=rank, world=world)


def met() -> Meeting:
    """Of the ranks of torch.distributed's default group."""
    return Meeting(store=_get_default_store(), rank=dist.get_rank(), world=dist.get_world_size())


def first_to_fail(store: Store) -> bool:
    """Whether no other rank has asked this before: of several that fail, one says why. Not by a collective: others may
    be gone, or wait in another.

    Raises:
        DistError: the store has gone.
    """
    return int(store.add(f"{PREFIX}failed", 1)) == 1


@contextmanager
def watched(pulse: Pulse, say: Say, limits: Limits = LIMITS, *, meeting: Meeting | None = None) -> Iterator[None]:
    """While entered on every rank of ``meeting``, or else of torch.distributed's default group, a rank that is frozen
    or stands still for longer than ``limits`` allow ends all of them with status 1; one of them calls ``say`` with the
    reason, in a thread.
    """
    watch = _Watch(pulse, say, limits, meeting or met())
    threads = [threading.Thread(target=run, daemon=True) for run in (watch.talk, watch.guard)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watch.leave.set()
        for thread in threads:
            thread.join(SAYING_SECS)  # the store may be frozen


class _Watch:
    def __init__(self, pulse: Pulse, say: Say, limits: Limits, meeting: Meeting) -> None:
        self._rank, self._world = meeting.rank, meeting.world
        # A connection of its own: operations on one wait for each other.
        self._store = meeting.store.clone()  # type: ignore[attr-defined]
        self._observer, self._say, self._limits = Observer(pulse, limits), say, limits
        self._judged = range(self._world) if self._rank == 0 else range(1)
        self._signs = Signs(self._judged, limits)
        self._posts: dict[int, bytes] = {}  # the last of each rank
        self._processes: dict[int, Process] = {}
        self._talks = 0
        self.leave = threading.Event()

    def talk(self) -> None:
        """In a thread: posts and reads until this rank leaves, or a rank is at fault."""
        lost = 0
        while not self.leave.is_set():
            try:
                self._talk()
                lost = 0
            except dist.DistError:
                traceback.print_exc()
                lost += 1
                if lost == MOST_LOST:
                    self._end_alone(f"{_store_host()} has gone")
            self.leave.wait(self._limits.beat_secs)
        with suppress(dist.DistError):  # its host may have left already
            self._post(None)

    def guard(self) -> None:
        """In a thread: ends this rank when the store no longer answers."""
        clock = AwakeClock(2 * self._limits.beat_secs)
        talks, since = self._talks, clock.now()
        while not self.leave.wait(self._limits.beat_secs):
            now = clock.now()
            if self._talks != talks:
                talks, since = self._talks, now
            elif now - since >= self._limits.silent_secs:
                self._end_alone(f"{_store_host()} has shown no sign of life for {now - since:.0f} s")

    def _talk(self) -> None:
        self._post(self._observer.beat())
        if self._store.check([f"{PREFIX}verdict"]):
            _end_processes(json.loads(self._store.get(f"{PREFIX}verdict")))
        self._read()
        self._talks += 1
        sightings = self._signs.sightings()
        fault = (judge if self._rank == 0 else judge_silence)(sightings, self._limits)
        if not fault:
            return
        silent = [rank for rank, s in sightings.items() if s.silent_secs >= self._limits.doubtful_secs]
        frozen = [self._processes[rank] for rank in silent if rank in self._processes]
        if first_to_fail(self._store):
            self._speak(fault)
        self._store.set(f"{PREFIX}verdict", json.dumps(frozen))
        self._end(frozen)

    def _post(self, beat: Beat | None) -> None:
        """``beat``: None when this rank leaves."""
        post = (self._talks, socket.gethostname(), os.getpid(), asdict(beat) if beat else None)
        self._store.set(_key(self._rank), json.dumps(post))

    def _read(self) -> None:
        for rank in self._judged:
            if rank not in self._posts and not self._store.check([_key(rank)]):
                continue
            post = self._store.get(_key(rank))
            if post == self._posts.get(rank):
                continue
            self._posts[rank] = post
            _, host, pid, beat = json.loads(post)
            self._processes[rank] = host, pid
            if beat is None:
                self._signs.finished(rank)
            else:
                self._signs.heard(rank, Beat(**beat))

    def _end_alone(self, fault: str) -> None:
        """Without the store nobody can agree who says it: the first rank of each machine does, and rank 1 for rank 0,
        which may be the one at fault."""
        if self._rank == min(1, self._world - 1) or (self._rank > 0 and launched_local_rank() == 0):
            self._speak(fault)
        self._end(list(self._processes.values()))

    def _speak(self, fault: str) -> None:
        saying = threading.Thread(target=self._say, args=(fault,), daemon=True)
        saying.start()
        saying.join(SAYING_SECS)  # the main thread may hold what it needs

    def _end(self, frozen: Sequence[Process]) -> None:
        """After the others had time to do the same, since a launcher ends all ranks when one ends."""
        time.sleep(2 * self._limits.beat_secs)
        _end_processes(frozen)


def _end_processes(frozen: Sequence[Process]) -> None:
    """Ends this process, and before it those ``frozen`` ones of this machine that the same launcher has started.
    torchrun would ask them to end, and make them only 30 s later (torch 2.13, ``elastic/multiprocessing/api.py``)."""
    for host, pid in frozen:
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if host == socket.gethostname() and parent == os.getppid() and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
    os._exit(1)


def _key(rank: int) -> str:
    return f"{PREFIX}beat/{rank}"


def _store_host() -> str:
    """Who holds the store: torchrun where it says so to its ranks, else rank 0."""
    address = os.environ.get("MASTER_ADDR", "this machine")
    holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    return f"{holder} on {address}, where the store of torch.distributed is,"
