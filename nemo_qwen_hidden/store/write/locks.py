"""Who may work on a folder, a store or a training run: one job at a time, and none while ranks of an earlier one are
still there.

Locks are ``flock``: the kernel lets go of them when a process ends, however it ends.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.errors import StoreError, UserError
from nemo_qwen_hidden.store.fields import load_json
from nemo_qwen_hidden.store.files import read_inside
from nemo_qwen_hidden.store.format import JOB_LOCK, JOURNAL, MARKER, RANKS_LOCK

ORPHANS_SECS = 30.0
_POLL_SECS = 0.1
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True, kw_only=True)
class Lockable:
    """A kind of folder. name: as errors call one, which are of kind ``error`` and name ``setting``. locks: the folder
    in it for the files of its locks."""

    name: str
    setting: str
    locks: str
    error: type[UserError]


STORE = Lockable(name="a store", setting="store.path", locks=JOURNAL, error=StoreError)


@contextmanager
def job_lock(folder: Path, *, of: Lockable = STORE, patience_secs: float = ORPHANS_SECS) -> Iterator[None]:
    """While entered, no other job works on ``folder``. Makes the folder and the one for locks in it.

    Raises:
        UserError: of the kind of ``of``: another job does, and says who; or ranks of an earlier one do not end within
            ``patience_secs``; or the file system has no locks.
    """
    with _locked_job(folder, of):
        wait_for_ranks(folder, of=of, patience_secs=patience_secs)
        yield


def wait_for_ranks(folder: Path, *, of: Lockable = STORE, patience_secs: float = ORPHANS_SECS) -> None:
    """Returns when no rank writes to ``folder``.

    Raises:
        UserError: of the kind of ``of``: some still do after ``patience_secs``; says who.
    """
    with _open(folder / of.locks, RANKS_LOCK) as ranks:
        deadline = time.monotonic() + patience_secs
        while not _try(ranks, fcntl.LOCK_EX, folder, of):
            if time.monotonic() > deadline:
                rule = f"must be {of.name} that no rank writes to; one of an earlier run does ({_holder(ranks)})"
                raise of.error(of.setting, rule, str(folder))
            time.sleep(_POLL_SECS)


@contextmanager
def _locked_job(folder: Path, of: Lockable) -> Iterator[None]:
    """A job that ends takes the lock's file away, so that what was locked may be a file that has no name any more."""
    locks = folder / of.locks
    while True:
        with ExitStack() as stack:
            try:
                locks.mkdir(parents=True, exist_ok=True)
                descriptor = stack.enter_context(_open(locks, JOB_LOCK))
                if not _try(descriptor, fcntl.LOCK_EX, folder, of):
                    rule = f"must be {of.name} that no other run is working on; {_holder(descriptor)} is"
                    raise of.error(of.setting, rule, str(folder))
                same = os.path.samestat(os.fstat(descriptor), os.stat(locks / JOB_LOCK))
            except (FileNotFoundError, FileExistsError):  # the second: gone again before mkdir could look at it
                if os.path.lexists(locks) and not locks.is_dir():
                    raise
                continue
            if same:
                _sign(descriptor)
                yield
                return


@contextmanager
def rank_lock(folder: Path, producers: Sequence[Mapping[str, Any]] = (), *, of: Lockable = STORE) -> Iterator[None]:
    """While entered, a later job waits for this process; taken by every rank that writes, beside each other.

    Args:
        producers: of the manifest that this rank's job makes of a store. A later job has put its own into the marker
            before it waits for ranks, so that a rank which is late, and whose job has gone, finds that out here.

    Raises:
        UserError: of the kind of ``of``: another job works on the folder.
    """
    with _open(folder / of.locks, RANKS_LOCK) as descriptor:
        if not _try(descriptor, fcntl.LOCK_SH, folder, of) or not _is_of(folder, producers):
            raise of.error(of.setting, f"must be {of.name} that no other run begins to work on", str(folder))
        _sign(descriptor)
        yield


def _is_of(folder: Path, producers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the marker, if there is one, is that of the job with these ``producers``."""
    if not (folder / MARKER).exists():
        return True
    target = load_json(read_inside(folder, MARKER), str(folder / MARKER)).get("target", {})
    return bool(target.get("producers") == json.loads(json.dumps(list(producers))))


@contextmanager
def _open(locks: Path, name: str) -> Iterator[int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(locks / name, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int, folder: Path, of: Lockable) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        rule = f"must lie on a file system with locks, so that two runs cannot write to it ({error.strerror})"
        raise of.error(of.setting, rule, str(folder)) from error
    return True


def _sign(descriptor: int) -> None:
    """Writes down who holds the lock, for the error that another gets."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(holder).encode()
    os.pwrite(descriptor, text + b"\n", 0)
    os.ftruncate(descriptor, len(text) + 1)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (ValueError, KeyError, TypeError):
        return "one that has not said which"
