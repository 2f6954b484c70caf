"""Runs a job on ranks that it starts itself, or as one rank of those that torchrun started."""

import os
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.cli.terminal import Bar, Terminal
from nemo_qwen_hidden.errors import HiddenStatesError, PeerError, RankError, UserError
from nemo_qwen_hidden.extract import Begun, RankResult, Summary
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.parallel import launch

if TYPE_CHECKING:
    from nemo_qwen_hidden.parallel.groups import ProcessGroups

FAILED, USER_ERROR = 1, 2


def status_of(error: BaseException) -> int:
    """Exit status: 2 for what the user can mend, 1 for the rest."""
    return USER_ERROR if isinstance(error, UserError) else FAILED


class Log:
    """Where libraries' words go: a file beside the store, or a temporary one where none can be made there."""

    def __init__(self, store: Path) -> None:
        store = Path(os.path.abspath(store))
        self.path = store.with_name(store.name + ".log")
        self._made = [folder for folder in self.path.parents if not folder.exists()]  # the deepest first
        if not self._made and not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
            descriptor, name = tempfile.mkstemp(prefix="nemo_qwen_hidden-", suffix=".log")
            os.close(descriptor)
            self.path = Path(name)
        self._bytes = self.path.stat().st_size if self.path.exists() else 0
        self.path.parent.mkdir(parents=True, exist_ok=True)

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
        UserError: it could not be done. Nothing is left of it, but under torchrun, where other ranks may be writing
            still, what was begun stays, marked as unfinished.
        RankError: a fault; what was begun stays, marked as unfinished.
        PeerError: another rank failed, and says why.
        KeyboardInterrupt: Ctrl-C or SIGTERM; all ranks have ended, and the text says what is left.
    """
    log = Log(job.store_path)
    try:
        return _start_ranks(job, terminal, log) if launch.launched_world() is None else _be_a_rank(job, terminal, log)
    except (UserError, PeerError):
        raise
    except Exception as error:  # a fault: one line for the terminal, all of it in the log
        with open(log.path, "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        reason = str(error) if isinstance(error, HiddenStatesError) else f"{type(error).__name__}: {error}"
        raise RankError(f"{reason.splitlines()[0]} (more in {log.path})") from error


def _begin(job: Job, bar: Bar, log: Log) -> Begun:
    try:
        return extract.begin(job, bar)
    except (UserError, KeyboardInterrupt):
        log.undo()
        raise


def _start_ranks(job: Job, terminal: Terminal, log: Log) -> Summary:
    with launch.terminating_interrupts(), terminal.progress() as bar, launch.output_to(log.path):
        launch.warm_up(log.path)  # NeMo is imported while the data is tokenized
        begun = _begin(job, bar, log)
        try:
            bar.expect(rows=begun.tokens.rows, replicas=job.topology.dp)
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

    with process_groups(job.topology, rank=rank.rank, init_method=rank.init_method) as groups:
        return extract.run(job, begun, groups, rank.send)


def _be_a_rank(job: Job, terminal: Terminal, log: Log) -> Summary | None:
    with terminal.progress() as bar, launch.output_to(log.path):
        from nemo_qwen_hidden.parallel.agree import gather_values, on_rank_0
        from nemo_qwen_hidden.parallel.groups import process_groups

        with process_groups(job.topology) as groups:
            try:
                begun = on_rank_0(lambda: _begin(job, bar, log), groups, status_of=status_of)
            except PeerError as error:
                if error.status == USER_ERROR:
                    log.undo()
                raise
            bar.expect(rows=begun.tokens.rows, replicas=job.topology.dp)
            result = _run_among_others(job, begun, groups, bar)
            results = gather_values(result, groups)
            summary = on_rank_0(lambda: extract.finish(job, begun, results), groups, status_of=status_of)
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
