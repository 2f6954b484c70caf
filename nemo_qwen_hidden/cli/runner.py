"""Runs a job on ranks that it starts itself, or as one rank of those that torchrun started."""

import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.cli.terminal import Bar, Terminal
from nemo_qwen_hidden.errors import HiddenStatesError, PeerError, RankError, UserError
from nemo_qwen_hidden.extract import RankResult, Summary
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.parallel import launch
from nemo_qwen_hidden.progress import Phase
from nemo_qwen_hidden.provenance import Begun

if TYPE_CHECKING:
    from nemo_qwen_hidden.parallel.groups import ProcessGroups

FAILED, USER_ERROR = 1, 2


def status_of(error: BaseException) -> int:
    """Exit status: 2 for what the user can mend, 1 for the rest."""
    if isinstance(error, PeerError):
        return error.status
    return USER_ERROR if isinstance(error, UserError) else FAILED


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
        with _saying_at_once(terminal, log):
            return _be_a_rank(job, terminal, log)
    try:
        return _start_ranks(job, terminal, log)
    except UserError:
        raise
    except Exception as error:
        raise RankError(_fault(error, log)) from error


def _fault(error: Exception, log: Log) -> str:
    """One line for the terminal; all of it goes into the log."""
    with open(log.path, "a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    reason = str(error) if isinstance(error, HiddenStatesError) else f"{type(error).__name__}: {error}"
    return f"{reason.splitlines()[0]} (more in {log.path})"


@contextmanager
def _saying_at_once(terminal: Terminal, log: Log) -> Iterator[None]:
    """Says what is raised inside, and raises PeerError for it. A rank of torchrun's cannot leave that to ``main``: when
    its peers notice and end, torchrun ends it too, perhaps before it gets there."""
    try:
        yield
    except PeerError:
        raise
    except Exception as error:
        terminal.error(str(error) if isinstance(error, UserError) else _fault(error, log))
        raise PeerError(status_of(error)) from error


def _begin(job: Job, bar: Bar, log: Log) -> Begun:
    try:
        return extract.begin(job, bar)
    except (UserError, KeyboardInterrupt):
        log.undo()
        raise


def _start_ranks(job: Job, terminal: Terminal, log: Log) -> Summary:
    with launch.one_interrupt(), terminal.progress() as bar, launch.output_to(log.path):
        launch.warm_up(log.path)  # NeMo is imported while the data is tokenized
        begun = _begin(job, bar, log)
        try:
            bar.expect(rows=begun.tokens.rows, replicas=job.topology.dp)
            bar(Phase("starting ranks"))
            results = launch.run_ranks(
                _started, (job, begun), world=job.topology.world, log=log.path, on_event=lambda rank, event: bar(event)
            )
            return extract.finish(job, begun, results)
        except UserError:  # all ranks have ended: nothing writes any more
            extract.discard(job)
            log.undo()
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_unfinished(job)) from None


def _unfinished(job: Job) -> str:
    return f"{job.store_path} is unfinished, and store.overwrite=true starts it again"


def _started(rank: launch.Rank, job: Job, begun: Begun) -> RankResult:
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        return extract.run(job, begun, groups, rank.send)


def _be_a_rank(job: Job, terminal: Terminal, log: Log) -> Summary | None:
    def begin() -> Begun:
        with _saying_at_once(terminal, log):
            return _begin(job, bar, log)

    def finish() -> Summary:
        with _saying_at_once(terminal, log):
            return extract.finish(job, begun, results)

    with terminal.progress() as bar, launch.output_to(log.path):
        from nemo_qwen_hidden.parallel.agree import gather_values, on_rank_0
        from nemo_qwen_hidden.parallel.groups import process_groups

        with process_groups(job.topology) as groups:
            try:
                begun = on_rank_0(begin, groups, status_of=status_of)
            except PeerError as error:
                if error.status == USER_ERROR:
                    log.undo()
                raise
            bar.expect(rows=begun.tokens.rows, replicas=job.topology.dp)
            with _saying_at_once(terminal, log):
                result = _run_among_others(job, begun, groups, bar)
            results = gather_values(result, groups)
            summary = on_rank_0(finish, groups, status_of=status_of)
            return summary if groups.place.rank == 0 else None


def _run_among_others(job: Job, begun: Begun, groups: "ProcessGroups", bar: Bar) -> RankResult:
    """``extract.run``; of an error that several ranks run into, one is left to be said. Collective over all ranks."""
    from nemo_qwen_hidden.parallel.agree import is_lost_peer

    try:
        return extract.run(job, begun, groups, bar)
    except UserError as error:
        if not _first_to_fail():
            raise PeerError(USER_ERROR) from error
        raise
    except RuntimeError as error:
        if is_lost_peer(error):
            raise PeerError from error
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_unfinished(job)) from None


def _first_to_fail() -> bool:
    """Whether no other rank has asked this before. Not by a collective: others may be gone, or wait in another."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return int(_get_default_store().add("nemo_qwen_hidden/failed", 1)) == 1
    except RuntimeError:  # the store was in a rank that has ended
        return True
