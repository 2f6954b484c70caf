"""Writes hidden states to their places. Every rank has a writer of its own on the same folder.

A header depends on sizes alone, so a shard's length and the offset of each of its states are known before any data:
whoever comes first makes the file, everyone writes where its states belong, and nobody waits. The disk is a thread's
business, behind a queue of bounded size; what it has made durable goes into the journal.

Everything here counts states. In a store that keeps the states of all rows, their numbers are the rows'; else
``TokenTable.states_of`` says which states some rows have.

Legend: n states of one call, H numbers in each, the entry's ``width``.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from nemo_qwen_hidden.errors import CoverageError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.files import naming_store
from nemo_qwen_hidden.store.format import JOURNAL, Shard
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.statistics import StoredError, add_error
from nemo_qwen_hidden.store.write.encode import encode
from nemo_qwen_hidden.store.write.journal import JournalWriter
from nemo_qwen_hidden.store.write.locks import rank_lock
from nemo_qwen_hidden.store.write.seal import publish
from nemo_qwen_hidden.store.write.sealer import Sealer
from nemo_qwen_hidden.store.write.shard_files import Batch, Piece, ShardFiles
from nemo_qwen_hidden.trace.record import UNTRACED, Trace

QUEUE_BYTES = 256 * 2**20
COMMIT_SECS = 10.0


class RowRun(Protocol):
    """Consecutive states ``first_row`` to ``first_row + length``: numbers of states, not of rows where some rows have
    none."""

    @property
    def first_row(self) -> int: ...

    @property
    def length(self) -> int: ...


class ShardWriter:
    """Writes states of the hook points that this rank can see to shards under temporary names.

    Args:
        folder: the store's folder, begun by ``session``. target: what it will be; the same on every rank.
        rank: of this process. done: states that are there already; they are passed over.
        nonfinite: ``refuse`` or ``keep`` infinite values and NaN. commit_secs: after this time what was written is made
            durable, so that a crash costs at most the work of that long. queue_bytes: of states that wait for the disk;
            ``write`` blocks beyond it. progressed: called whenever the disk has taken something.
        max_open_files: shards kept open at once. sealing_threads: where not 0, shards that this writer fills alone are
            sealed as they become whole, by one thread that takes only the time others leave, and after ``close`` was
            called by that many; 0 leaves all shards to ``session.seal_shards``. trace: is told of encoding, waiting,
            writing, syncing and sealing.

    A context manager: it closes, or only lets go of its files where the block raised.
    """

    def __init__(
        self,
        folder: Path,
        target: Manifest,
        *,
        rank: int,
        done: Mapping[HookPoint, RowSet] | None = None,
        nonfinite: str = "refuse",
        commit_secs: float = COMMIT_SECS,
        queue_bytes: int = QUEUE_BYTES,
        progressed: Callable[[], None] = lambda: None,
        max_open_files: int = 64,
        sealing_threads: int = 0,
        trace: Trace = UNTRACED,
    ) -> None:
        self._target, self._nonfinite, self._trace = target, nonfinite, trace
        self._missing = {
            entry.point: RowSet([(0, target.states)]) - (done or {}).get(entry.point, RowSet())
            for entry in target.hook_points
        }
        with ExitStack() as stack, naming_store(folder, JOURNAL):
            stack.enter_context(rank_lock(folder, target.producers))
            journal = JournalWriter(folder, rank)
            stack.callback(journal.close)
            files = ShardFiles(folder, target, max_open_files)
            stack.callback(files.close)
            sealer = Sealer(folder, target, threads=sealing_threads, progressed=progressed, trace=trace)
            self._disk = _DiskThread(
                folder,
                files,
                journal,
                sealer,
                commit_secs=commit_secs,
                queue_bytes=queue_bytes,
                progressed=progressed,
                trace=trace,
            )
            self._resources = stack.pop_all()

    def write(
        self,
        hook_point: HookPoint,
        runs: Sequence[RowRun],
        values_nH: torch.Tensor,
        divisor_n: torch.Tensor | None = None,
    ) -> None:
        """Takes the states of ``runs``, which ``values_nH`` holds in that order; they are on disk after ``close``.

        Args:
            values_nH: [n states, H], any float dtype, on the CPU; cast to the stored dtype here. Not to be changed
                afterwards.
            divisor_n: fp32 [n], what the final norm divided each state by; of hook points whose entry has it alone.

        Raises:
            StoreError: a value is not finite, or too large for the stored dtype (nothing of this call is written); or
                what the disk thread met since the last call, such as a full disk.
            ValueError: states outside the store, or values or divisors of another shape, device or kind than above.
        """
        check_values(self._target, hook_point, runs, values_nH, divisor_n)
        pieces = tuple(self._pieces(hook_point, runs))
        if pieces:
            with self._trace.span("encode", hook_point=hook_point, states=len(values_nH)):
                encoded = encode(
                    values_nH,
                    self._target.dtype,
                    nonfinite=self._nonfinite,
                    row_at=partial(state_name, self._target, hook_point, runs),
                )
            self._disk.put(
                Batch(
                    point=hook_point,
                    pieces=pieces,
                    encoded=encoded,
                    divisor=None if divisor_n is None else divisor_n.contiguous(),
                )
            )

    def close(self) -> None:
        """Returns when everything written is durable and in the journal; a second call does nothing.

        Raises:
            StoreError: no space is left, or the store has vanished.
            OSError: whatever else the disk reports.
        """
        with self._resources:
            self._disk.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._resources:
            if kind is None:
                self._disk.finish()
            else:
                self._disk.abandon()

    def _pieces(self, point: HookPoint, runs: Iterable[RowRun]) -> Iterator[Piece]:
        """The missing ones of some states, those that continue each other joined: fewer and larger writes."""
        index, last = 0, None
        for run in runs:
            for state, length in self._missing[point].within(run.first_row, run.length):
                start = index + state - run.first_row
                piece = Piece(first_state=state, length=length, index=start)
                if last is not None and (last.first_state + last.length, last.index + last.length) == (state, start):
                    last = Piece(first_state=last.first_state, length=last.length + length, index=last.index)
                    continue
                if last is not None:
                    yield last
                last = piece
            index += run.length
        if last is not None:
            yield last


class _DiskThread:
    """Takes batches from a queue to the disk, and from time to time makes them durable and says so in the journal.

    What it raises is raised by every later call of ``put`` and ``finish``.
    """

    def __init__(
        self,
        folder: Path,
        files: ShardFiles,
        journal: JournalWriter,
        sealer: Sealer,
        *,
        commit_secs: float,
        queue_bytes: int,
        progressed: Callable[[], None],
        trace: Trace,
    ) -> None:
        self._folder, self._files, self._journal, self._sealer = folder, files, journal, sealer
        self._trace = trace
        self._commit_secs, self._queue_bytes, self._progressed = commit_secs, queue_bytes, progressed
        self._changed = threading.Condition()
        self._queue: deque[Batch] = deque()
        self._queued_bytes = 0
        self._closing = self._abandoned = False
        self._failure: BaseException | None = None
        self._states: dict[HookPoint, list[tuple[int, int]]] = {}
        self._errors: dict[Shard, StoredError] = {}
        self._thread = threading.Thread(target=self._run, name="store writer", daemon=True)
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Queues a batch; waits while the queue is full."""
        with self._changed:
            if self._closing:
                raise ValueError("the writer is closed")
            if not self._has_room(batch):
                with self._trace.span("wait for disk", queued_bytes=self._queued_bytes):
                    self._changed.wait_for(lambda: self._has_room(batch))
            self._raise_failure()
            self._queue.append(batch)
            self._count(batch.bytes)

    def finish(self) -> None:
        """Returns when all is durable and the thread has ended."""
        self._end()
        self._raise_failure()

    def abandon(self) -> None:
        """Ends the thread without what is still queued."""
        self._abandoned = True
        self._end()

    def _end(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        with self._trace.span("wait for disk", queued_bytes=self._queued_bytes):
            self._thread.join()

    def _has_room(self, batch: Batch) -> bool:
        """Whether ``put`` need not wait: also where it is to raise, or one batch is larger than the queue."""
        fits = self._queued_bytes + batch.bytes <= self._queue_bytes
        return fits or not self._queue or self._failure is not None

    def _count(self, more_bytes: int) -> None:
        """The queue has changed."""
        self._queued_bytes += more_bytes
        self._trace.count("queued bytes", self._queued_bytes)
        self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            committed = time.monotonic()
            while not self._abandoned:
                batch = self._next(committed + self._commit_secs - time.monotonic() if self._states else None)
                if batch is not None:
                    self._write(batch)
                elif self._closing and not self._queue:
                    self._conclude()
                    return
                if batch is None or time.monotonic() - committed > self._commit_secs:
                    self._commit()
                    committed = time.monotonic()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._queue.clear()
                self._changed.notify_all()
        finally:
            self._sealer.abandon()

    def _conclude(self) -> None:
        """Shards are read while the disk takes what is left, so that this takes as long as the slower of both."""
        self._sealer.hurry()
        self._commit()
        self._sealer.finish()
        self._commit()

    def _next(self, patience_secs: float | None) -> Batch | None:
        """The next batch; None where there is none in that time (None: however long), or no more will come. It counts
        as queued until it is written."""
        limit = None if patience_secs is None else max(0.0, patience_secs)
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing, limit)
            return self._queue[0] if self._queue else None

    def _write(self, batch: Batch) -> None:
        with self._trace.span("write", hook_point=batch.point, bytes=batch.bytes):
            pieces = list(self._files.write(batch))
        for written in pieces:
            if written.error is not None:
                add_error(self._errors, written.shard, written.error)
            self._states.setdefault(batch.point, []).append((written.first_state, written.states))
            self._sealer.written(written)
        with self._changed:
            self._queue.popleft()
            self._count(-batch.bytes)
        self._progressed()

    def _commit(self) -> None:
        """In this order: bytes are durable, rows are claimed, shards get their names, and are claimed."""
        measured = self._sealer.measured()
        if not (self._states or measured):
            return
        with self._trace.span("sync"):
            self._files.sync(measured)
        self._progressed()
        if self._states:
            self._claim()
        if measured:
            publish(self._folder, measured)
            self._files.forget(measured)
            self._journal.sealed(measured)

    def _claim(self) -> None:
        durable = {point: RowSet(ranges) for point, ranges in self._states.items()}
        for point, states in durable.items():
            if len(states) != sum(length for _, length in self._states[point]):
                raise CoverageError(f"states of {point} were written more than once by one rank")
        with self._trace.span("journal"):
            self._journal.rows({point: states.ranges for point, states in durable.items()}, self._errors)
        self._states, self._errors = {}, {}


def check_values(
    target: Manifest,
    point: HookPoint,
    runs: Sequence[RowRun],
    values_nH: torch.Tensor,
    divisor_n: torch.Tensor | None,
) -> None:
    """Whether these can be states of the store that ``target`` says.

    Raises:
        ValueError: states outside of it, or values or divisors of another shape, device or kind than its entry says.
    """
    if point not in target.points:
        raise ValueError(f"{point} is not one of the hook points of this store")
    if values_nH.device.type != "cpu" or not values_nH.dtype.is_floating_point:
        raise ValueError(f"values must be floats on the CPU, but are {values_nH.dtype} on {values_nH.device}")
    entry = target.entry(point)
    expected = (sum(run.length for run in runs), entry.width)
    if tuple(values_nH.shape) != expected:
        rule = f"must be {list(expected)}, as its entry and these runs say"
        raise ValueError(f"values of {point} {rule}, but are {list(values_nH.shape)}")
    for run in runs:
        if run.length < 0 or not 0 <= run.first_row <= run.first_row + run.length <= target.states:
            raise ValueError(f"states {run.first_row} + {run.length} do not lie within {target.states}")
    wanted = [len(values_nH)] if entry.divisor else None
    found = None if divisor_n is None else list(divisor_n.shape)
    if found != wanted:
        raise ValueError(f"divisors of {point} must be {wanted}, as its entry says, but are {found}")
    if divisor_n is not None and (divisor_n.dtype != torch.float32 or divisor_n.device.type != "cpu"):
        raise ValueError(f"divisors must be float32 on the CPU, but are {divisor_n.dtype} on {divisor_n.device}")


def state_name(target: Manifest, point: HookPoint, runs: Iterable[RowRun], index: int) -> str:
    """The state at ``index`` along the concatenated runs, as errors call it."""
    what = "row" if target.states == target.rows else "state"
    for run in runs:
        if index < run.length:
            return f"{point} {what} {run.first_row + index}"
        index -= run.length
    raise IndexError(index)
