"""Runs a job on ranks that it starts itself, or as one rank of those that torchrun started."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nemo_qwen_hidden import extract, running
from nemo_qwen_hidden.cli.fault import fault_line, one_says, saying_at_once
from nemo_qwen_hidden.cli.terminal import Bar, Terminal
from nemo_qwen_hidden.errors import USER_ERROR, PeerError, RankError, UserError, status_of
from nemo_qwen_hidden.extract import Summary
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.parallel import launch
from nemo_qwen_hidden.parallel.watch import Pulse
from nemo_qwen_hidden.progress import Phase
from nemo_qwen_hidden.running import Begun, RankResult
from nemo_qwen_hidden.store.format import MARKER
from nemo_qwen_hidden.target import RESUMED

if TYPE_CHECKING:
    from nemo_qwen_hidden.parallel.groups import ProcessGroups

T = TypeVar("T")


class Log:
    """Where libraries' words go: a file beside the store, or a temporary one where none can be made there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = [folder for folder in path.parents if not folder.exists()]  # the deepest first
        self._bytes = path.stat().st_size if path.is_file() else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError:
            descriptor, name = tempfile.mkstemp(prefix="nemo_qwen_hidden-", suffix=".log")
            os.close(descriptor)
            self.path, self._bytes = Path(name), 0

    def undo(self) -> None:
        """Leaves the log, and the folders made for it and the store, as they were before the run."""
        with suppress(FileNotFoundError):
            if self._bytes:
                os.truncate(self.path, self._bytes)
            else:
                self.path.unlink()
        for folder in self._made:
            with suppress(OSError):  # another rank was quicker, or something else has come into it
                folder.rmdir()


def run_job(job: Job, terminal: Terminal) -> Summary | None:
    """Runs ``job`` to its end; the summary is None on ranks other than 0.

    Raises:
        UserError: it could not be done, and nothing is left of it.
        RankError: a fault; what was begun stays, marked as unfinished.
        PeerError: a rank of torchrun's failed and has said why. What was begun stays, marked as unfinished, unless
            no rank had started to write.
        KeyboardInterrupt: Ctrl-C or SIGTERM; all ranks have ended, and the text says what is left.
    """
    log = Log(job.log_path)
    if launch.launched_world() is not None:
        with saying_at_once(terminal, log.path):
            return _be_a_rank(job, terminal, log)
    try:
        return _start_ranks(job, terminal, log)
    except UserError:
        raise
    except Exception as error:
        fault = RankError(fault_line(error, log.path))
        fault.add_note(_unfinished(job))
        raise fault from error


@contextmanager
def _undoing(log: Log, lock: ExitStack) -> Iterator[None]:
    """Leaves nothing of a run that inside turns out not to be possible."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        lock.close()
        log.undo()
        raise


def _lock(job: Job, log: Log, lock: ExitStack) -> Job | None:
    """Locks the store until ``lock`` closes; the job that has to come first, where there is one, whose store goes
    then."""
    with _undoing(log, lock):
        lock.enter_context(extract.locked(job))
        lock.callback(extract.drop_norms, job)
        return extract.norm_job(job)


def _begin(job: Job, bar: Bar, log: Log, lock: ExitStack, norms: Job | None = None) -> Begun:
    with _undoing(log, lock):
        if job.norms_only:
            lock.enter_context(extract.locked(job))
        return extract.begin(job, bar, norms=norms)


def _start_ranks(job: Job, terminal: Terminal, log: Log) -> Summary:
    with launch.one_interrupt(), terminal.progress() as bar, launch.output_to(log.path), ExitStack() as lock:
        launch.warm_up(log.path)  # NeMo is imported while the data is tokenized
        norms = _lock(job, log, lock)
        if norms is not None:
            _run_first(norms, job, bar, log, lock)
        return _start_and_finish(job, bar, log, lock, norms)


def _run_first(norms: Job, job: Job, bar: Bar, log: Log, lock: ExitStack) -> None:
    """Runs the job that has to come before ``job``."""
    bar(Phase("finding norms"))
    try:
        with _undoing(log, lock), ExitStack() as own:
            _start_and_finish(norms, bar, log, own, None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_unfinished(job)) from None


def _start_and_finish(job: Job, bar: Bar, log: Log, lock: ExitStack, norms: Job | None) -> Summary:
    begun = _begin(job, bar, log, lock, norms)
    if begun.work is None:
        return extract.finish(job, begun, [])
    try:
        bar.expect(rows=len(begun.missing), replicas=job.topology.dp)
        if begun.work == RESUMED:
            bar(Phase(f"resuming: {len(begun.missing):,} of {begun.manifest.states:,} states are to be made"))
        bar(Phase("starting ranks"))
        results = launch.run_ranks(
            _started, (job, begun), world=job.topology.world, log=log.path, on_event=lambda rank, event: bar(event)
        )
        return extract.finish(job, begun, results)
    except UserError as error:  # all ranks have ended: nothing writes any more
        if extract.discard(job):
            lock.close()
            log.undo()
        elif not job.norms_only:
            error.add_note(_unfinished(job))
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_unfinished(job)) from None


def _unfinished(job: Job) -> str:
    if not (job.store_path / MARKER).is_file():
        if job.store_path.is_dir() and any(job.store_path.iterdir()):
            return f"what is left at {job.store_path} belongs to no store any more; delete it before the next run"
        return f"nothing of the run is left at {job.store_path}"
    without = " without store.overwrite=true" if job.settings.store.overwrite else ""
    return f"{job.store_path} is unfinished; the same command{without} goes on from there"


def _started(rank: launch.Rank, job: Job, begun: Begun) -> RankResult:
    import nemo_qwen_hidden.preload  # noqa: F401 - done already, but where there is a GPU
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        return running.run(job, begun, groups, rank.send, rank.pulse)


def _be_a_rank(job: Job, terminal: Terminal, log: Log) -> Summary | None:
    with terminal.progress() as bar, launch.output_to(log.path), ExitStack() as lock:
        import nemo_qwen_hidden.preload  # noqa: F401 - in the least time
        from nemo_qwen_hidden.parallel.groups import process_groups
        from nemo_qwen_hidden.parallel.peers import watched

        def say(fault: str) -> None:
            terminal.error(f"{fault} (more in {log.path})")
            terminal.error(_unfinished(job))

        pulse = Pulse()
        with process_groups(job.topology) as groups, watched(pulse, say):
            rank = _Rank(groups=groups, terminal=terminal, bar=bar, log=log, pulse=pulse)
            norms = rank.first(lambda: _lock(job, log, lock))
            if norms is not None:
                bar(Phase("finding norms"))
                with ExitStack() as own:
                    rank.run(norms, own, None)
            return rank.run(job, lock, norms)


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """One rank of those that torchrun started."""

    groups: "ProcessGroups"
    terminal: Terminal
    bar: Bar
    log: Log
    pulse: Pulse

    def first(self, step: Callable[[], T]) -> T:
        """Does on rank 0 what comes before anything is written. Collective over all ranks."""
        from nemo_qwen_hidden.parallel.agree import on_rank_0

        def said() -> T:
            with saying_at_once(self.terminal, self.log.path):
                return step()

        try:
            return on_rank_0(said, self.groups, status_of=status_of)
        except PeerError as error:
            if error.status == USER_ERROR:
                self.log.undo()
            raise

    def run(self, job: Job, lock: ExitStack, norms: Job | None) -> Summary | None:
        """Runs a job to its end among the others. Collective over all ranks."""
        from nemo_qwen_hidden.parallel.agree import gather_values, on_rank_0

        groups, is_first = self.groups, self.groups.place.rank == 0

        def finish() -> Summary:
            with saying_at_once(self.terminal, self.log.path):
                return extract.finish(job, begun, results)

        begun = self.first(lambda: _begin(job, self.bar, self.log, lock, norms))
        if begun.work is None:
            return extract.finish(job, begun, []) if is_first else None
        self.bar.expect(rows=len(begun.missing), replicas=job.topology.dp)
        with saying_at_once(self.terminal, self.log.path, None if job.norms_only else partial(_unfinished, job)):
            try:
                with one_says():
                    result = running.run(job, begun, groups, self.bar, self.pulse)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_unfinished(job)) from None
        results = gather_values(result, groups)
        summary = on_rank_0(finish, groups, status_of=status_of)
        return summary if is_first else None
