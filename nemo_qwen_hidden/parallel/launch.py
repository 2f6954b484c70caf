"""Starting ranks on this machine from a fork server that has imported NeMo once, and ending them together.

No NeMo, no torch here: the process that starts the ranks owns the terminal and stays light.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.errors import ConfigError, HiddenStatesError, RankError, UserError
from nemo_qwen_hidden.parallel.watch import LIMITS, Beat, Limits, Pulse, Signs, beating, judge

PRELOAD = ("nemo_qwen_hidden.preload",)
DEVICES = Path("/dev")
GRACE_SECS = 3.0


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a started rank knows of itself. ``send`` hands an event (anything that pickles) to the starter.

    rendezvous: a file that does not exist yet, where the ranks of one run meet. pulse: where the rank marks that it
    runs and how far it is; the starter ends all ranks when one stands still.
    """

    rank: int
    world: int
    rendezvous: Path
    send: Callable[[Any], None]
    pulse: Pulse


@dataclass(frozen=True)
class _Result:
    value: Any


@dataclass(frozen=True)
class _Failure:
    """error: what a user did wrong. lost_peer: the rank failed because another had gone."""

    error: UserError | None
    text: str
    lost_peer: bool


Target = Callable[..., Any]


def launched_world() -> int | None:
    """Number of ranks that torchrun, or another launcher with its environment, has started; None without one.

    Raises:
        ConfigError: ``RANK`` and ``WORLD_SIZE`` are there but make no sense.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            rule = "must be a whole number where a launcher sets it (unset RANK to run without one)"
            raise ConfigError(f"environment variable {name}", rule, os.environ[name])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world:
        raise ConfigError("environment variable RANK", f"must be below WORLD_SIZE ({world})", rank)
    return world


def launched_local_rank() -> int | None:
    """This process's number among the launcher's ranks on its machine; None without a launcher."""
    if launched_world() is None:
        return None
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


def local_world(world: int) -> int:
    """How many of ``world`` ranks are on this machine: all, unless a launcher says otherwise.

    Raises:
        ConfigError: the launcher's ``LOCAL_WORLD_SIZE`` makes no sense.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE") if launched_world() is not None else None
    if told is None:
        return world
    if not told.isdecimal() or told == "0":
        raise ConfigError("environment variable LOCAL_WORLD_SIZE", "must be a whole number of at least 1", told)
    return int(told)


def fair_threads(world: int) -> int:
    """This machine's usable cores, shared equally among the ranks on it."""
    return max(1, len(os.sched_getaffinity(0)) // local_world(world))


def is_first_rank() -> bool:
    """Whether this process is rank 0, or none that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def is_first_of_machine() -> bool:
    """Whether this process is the first of its machine's ranks, or none that a launcher started."""
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    return local_rank == "0" or not local_rank.isdecimal()  # where it makes no sense, each rank says so


def warm_up(log: Path) -> None:
    """Starts the fork server, which begins to import NeMo, and returns at once. What it prints goes to ``log``."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_preload())
    with output_to(log):
        forkserver.ensure_running()
    atexit.unregister(_end_server)
    atexit.register(_end_server)


def has_gpus() -> bool:
    """Whether this machine has GPUs, as far as its devices say: asking CUDA would initialise it."""
    return any(DEVICES.glob("nvidia[0-9]*"))


def _preload() -> list[str]:
    """What the fork server imports for all ranks. Nothing where there is a GPU: importing NeMo initialises CUDA there
    (nvidia-modelopt 0.37, ``quantization/triton/__init__.py:26``), which a forked process cannot use."""
    return [] if has_gpus() else list(PRELOAD)


def _end_server() -> None:
    """Left alone, a server that is still importing NeMo would go on for seconds after its starter has ended."""
    # CPython's own name for it since 3.4; nothing public has it.
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it has nothing to tidy, and SIGTERM makes its libraries write a stack


def run_ranks(
    target: Target,
    args: Sequence[Any] = (),
    *,
    world: int,
    log: Path,
    on_event: Callable[[int, Any], None] = lambda rank, event: None,
    limits: Limits = LIMITS,
) -> list[Any]:
    """Calls ``target(rank, *args)`` in ``world`` new processes and returns what each returned, by rank.

    The first rank to fail ends all of them, and so does one that is frozen or stands still for longer than ``limits``
    allow. Ranks get no terminal: what they print is appended to ``log``. They end when this process is gone.

    Raises:
        UserError: what a rank raised, as it was.
        RankError: a rank failed otherwise (its traceback is in ``log``), vanished, or hangs.
        KeyboardInterrupt: after the ranks were ended.
    """
    warm_up(log)
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="nemo_qwen_hidden-") as folder:
        ranks: list[tuple[ForkServerProcess, Connection]] = []
        finished = False
        try:
            for rank in range(world):
                here, there = context.Pipe(duplex=False)
                start = (rank, world, Path(folder) / "rendezvous", there, log, limits, target, tuple(args))
                process = context.Process(target=_main, args=start, daemon=True)
                process.start()
                there.close()
                ranks.append((process, here))
            results = _Collector(ranks, on_event, limits).results()
            finished = True
            return results
        finally:
            _end([process for process, _ in ranks], ask_first=not finished)
            for _, connection in ranks:
                connection.close()


def _main(
    rank: int,
    world: int,
    rendezvous: Path,
    pipe: Connection,
    log: Path,
    limits: Limits,
    target: Target,
    args: tuple[Any, ...],
) -> None:
    """In the rank. Ctrl-C reaches the whole foreground group; the starter decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _dup_log(log)
    voice, pulse = _Voice(pipe), Pulse()
    try:
        with beating(pulse, voice.beat, limits):
            known = Rank(rank=rank, world=world, rendezvous=rendezvous, send=voice.send, pulse=pulse)
            result = target(known, *args)
        voice.send(_Result(result))
    except BaseException as error:
        _log_error()
        last_line = traceback.format_exception_only(error)[-1].strip()
        with suppress(OSError):  # the starter may be gone
            voice.send(_Failure(error if isinstance(error, UserError) else None, last_line, is_lost_peer(error)))
        os._exit(1)
    finally:
        pipe.close()


def _log_error() -> None:
    """What is being handled, to the log; its disk may be the full one that is the reason."""
    with suppress(OSError):
        traceback.print_exc()
        sys.stderr.flush()


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` is what a collective raises when another rank has gone (gloo raises a plain RuntimeError). By
    name: the starter has no torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"DistBackendError", "DistNetworkError"}) or "gloo/transport" in str(error)


class _Voice:
    """A rank's end of its pipe, for its main thread and the one that beats."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def send(self, event: Any) -> None:
        with self._lock:
            self._pipe.send(event)

    def beat(self, beat: Beat) -> None:
        """Ends the process when the starter is gone: nobody else would, and its main thread may be stuck."""
        try:
            self.send(beat)
        except OSError:
            _log_error()
            os._exit(1)


class _Collector:
    """Listens to all ranks until each has returned, or one has failed or hangs."""

    def __init__(
        self,
        ranks: Sequence[tuple[ForkServerProcess, Connection]],
        on_event: Callable[[int, Any], None],
        limits: Limits,
    ) -> None:
        self._processes = [process for process, _ in ranks]
        self._pipes = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
        self._on_event = on_event
        self._results: dict[int, Any] = {}
        self._failures: list[HiddenStatesError] = []
        self._vanished: list[HiddenStatesError] = []
        self._lost_peers: list[HiddenStatesError] = []
        self._signs, self._limits = Signs(range(len(ranks)), limits), limits

    def results(self) -> list[Any]:
        while len(self._results) < len(self._processes):
            self._listen(timeout=self._limits.beat_secs)
            if self._failures or self._vanished or self._lost_peers:
                raise self._root_cause()
            fault = judge(self._signs.sightings(), self._limits)
            if fault:
                raise RankError(fault)
        return [self._results[rank] for rank in range(len(self._processes))]

    def _root_cause(self) -> HiddenStatesError:
        """When one rank goes, its peers soon report a lost connection, perhaps first. What a user did wrong explains
        more than a rank that vanished, that more than a traceback, and a lost connection nothing."""
        deadline = time.monotonic() + GRACE_SECS
        while not self._user_errors() and self._pipes and (left := deadline - time.monotonic()) > 0:
            self._listen(timeout=left)
        return [*self._user_errors(), *self._vanished, *self._failures, *self._lost_peers][0]

    def _user_errors(self) -> list[HiddenStatesError]:
        return [failure for failure in self._failures if isinstance(failure, UserError)]

    def _listen(self, timeout: float) -> None:
        for pipe in wait(list(self._pipes), timeout):
            assert isinstance(pipe, Connection)
            rank = self._pipes[pipe]
            try:
                event = pipe.recv()
            except (EOFError, ConnectionResetError):
                del self._pipes[pipe]
                self._ended(rank)
                continue
            self._signs.heard(rank, event if isinstance(event, Beat) else None)
            if isinstance(event, Beat):
                continue
            if isinstance(event, _Result):
                self._results[rank] = event.value
                self._signs.finished(rank)
            elif isinstance(event, _Failure):
                failures = self._lost_peers if event.lost_peer else self._failures
                failures.append(event.error or RankError(f"rank {rank} failed: {event.text}"))
                del self._pipes[pipe]
            else:
                self._on_event(rank, event)

    def _ended(self, rank: int) -> None:
        if rank not in self._results:
            self._processes[rank].join(GRACE_SECS)
            self._vanished.append(RankError(f"rank {rank} {_ending(self._processes[rank].exitcode)}"))


def _ending(code: int | None) -> str:
    """How a process ended that said nothing about it."""
    if code is None or code >= 0:
        return f"ended without a word (exit code {code})"
    name = signal.Signals(-code).name
    hint = ", as when the machine runs out of memory" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def _end(processes: Sequence[ForkServerProcess], *, ask_first: bool) -> None:
    """Ranks that have returned end by themselves; others are asked, then made to."""
    steps = [ForkServerProcess.terminate, ForkServerProcess.kill]
    with _deaf_to_interrupts():
        for step in steps if ask_first else [None, *steps]:
            alive = [process for process in processes if process.is_alive()]
            deadline = time.monotonic() + GRACE_SECS
            for process in alive:
                if step is not None:
                    step(process)
            for process in alive:
                process.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """A second, impatient Ctrl-C must not keep ranks alive. Only a main thread gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def one_interrupt() -> Iterator[None]:
    """While entered, the first SIGINT (Ctrl-C) or SIGTERM (``kill``, a batch system) raises ``KeyboardInterrupt``, and
    what an impatient hand sends after it does nothing: ending takes the time that it takes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _dup_log(log: Path) -> None:
    """Makes ``log`` this process's file descriptors 1 and 2."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """While entered, file descriptors 1 and 2 of this process, and of processes it starts, are ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        _dup_log(log)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a full disk
                stream.flush()
        for original, descriptor in zip(saved, (1, 2), strict=True):
            os.dup2(original, descriptor)
            os.close(original)
