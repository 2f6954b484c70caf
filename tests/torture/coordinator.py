"""The process that begins a job, starts its ranks and finishes it: a fork of the harness, so that it can be killed.

The harness itself keeps the fork server, in which NeMo is imported once for all ranks of all runs.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.config import Settings
from nemo_qwen_hidden.errors import status_of
from nemo_qwen_hidden.job import prepare
from nemo_qwen_hidden.parallel import launch
from nemo_qwen_hidden.parallel.watch import Limits
from tests.torture import ranks
from tests.torture.faults import Watch, install

QUICK = Limits(beat_secs=0.25)
RUN_SECS = 100.0
FINISHED, NOTHING_TO_DO = 0, 3


class Hang(Exception):
    """A run did not end."""


def warm_up(log: Path) -> None:
    """Starts the fork server and waits until it has imported NeMo."""
    launch.PRELOAD = (*launch.PRELOAD, "tests.torture.ranks")
    launch.GRACE_SECS = 0.5
    launch.warm_up(log)


class Run:
    """One run of a job, under way. ``word``: what the coordinator has said at its end."""

    def __init__(self, settings: Settings, watch: Watch, log: Path) -> None:
        self._watch, self._said = watch, watch.folder / "said.txt"
        for path in watch.pids.iterdir():
            if not _alive(int(path.name)):  # orphans of an earlier run die with this one, as when the power goes
                path.unlink()
        self._said.write_text("")
        # CPython's server ends when a client is killed between its connecting and its first message (3.11).
        launch.warm_up(log)
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _coordinate(settings, watch, log, self._said)
        self.status: int | None = None

    def ended(self) -> bool:
        """Whether the coordinator has."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Returns when the coordinator has ended, or earlier when ``until`` says so."""
        while not self.ended() and not until():
            if time.monotonic() - self.started > RUN_SECS:
                raise Hang(f"after {RUN_SECS:.0f} s: {self.ranks()}")
            time.sleep(0.002)

    def ranks(self) -> dict[int, str]:
        """Roles of the ranks that live, by process."""
        roles = {int(path.name): path.read_text() for path in self._watch.pids.iterdir()}
        return {pid: role for pid, role in roles.items() if role.startswith("rank") and _alive(pid)}

    def kill(self, *, ranks: bool = True, coordinator: bool = True) -> None:
        """SIGKILL to all of them at once; returns when they are gone."""
        living = self.ranks() if ranks else {}
        if coordinator and not self.ended():
            os.kill(self.pid, signal.SIGKILL)
        for pid in living:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if coordinator:
            self.wait()
        self.wait_for_ranks(living)

    def wait_for_ranks(self, ranks: dict[int, str]) -> None:
        deadline = time.monotonic() + RUN_SECS
        while any(_alive(pid) for pid in ranks):
            if time.monotonic() > deadline:
                raise Hang(f"ranks {ranks} do not end")
            time.sleep(0.002)

    @property
    def word(self) -> str:
        return self._said.read_text().strip()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _coordinate(settings: Settings, watch: Watch, log: Path, said: Path) -> None:
    """In the fork. Never returns."""
    status = 1
    try:
        # The server is the parent's child; to look after it is the parent's business.
        forkserver._forkserver.ensure_running = lambda: None
        forkserver.ensure_running = lambda: None
        install(watch)
        status = _job(settings, watch, log)
    except BaseException as error:
        said.write_text("".join(traceback.format_exception(error)[-1:]).strip())
        with open(log, "a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
        status = status_of(error)
    finally:
        os._exit(status)


def _job(settings: Settings, watch: Watch, log: Path) -> int:
    """As the command line does it."""
    job = prepare(settings, world=None, for_store=True)
    with extract.locked(job):
        begun = extract.begin(job)
        if begun.work is None:
            extract.finish(job, begun, [])
            return NOTHING_TO_DO
        results = launch.run_ranks(ranks.work, (watch, job, begun), world=job.topology.world, log=log, limits=QUICK)
        extract.finish(job, begun, results)
    return FINISHED
