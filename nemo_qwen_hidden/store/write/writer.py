"""Writes hidden states to their places. Every rank has a writer of its own on the same folder.

A header depends on sizes alone, so a shard's length and the offset of each of its states are known before any data:
whoever comes first makes the file, everyone writes where its states belong, and nobody waits. The disk is a thread's
business, behind a queue of bounded size; what it has made durable goes into the journal.

Everything here counts states. In a store that keeps the states of all rows, their numbers are the rows'; else
``TokenTable.states_of`` says which states some rows have.

Legend: n states of one call, H numbers in each, the entry's ``width``.
"""

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from nemo_qwen_hidden.errors import CoverageError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.files import naming_store, write_all
from nemo_qwen_hidden.store.format import JOURNAL, PARTIAL, Shard, shard_name
from nemo_qwen_hidden.store.header import Header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import DIVISOR, SCALE, header_of
from nemo_qwen_hidden.store.statistics import StoredError, add_error
from nemo_qwen_hidden.store.tensors import row_bytes
from nemo_qwen_hidden.store.write.encode import Encoded, encode
from nemo_qwen_hidden.store.write.journal import JournalWriter
from nemo_qwen_hidden.store.write.locks import rank_lock
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


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive states of a call that are to be written; the first is at ``index`` of its values."""

    first_state: int
    length: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one call hands to the disk thread."""

    point: HookPoint
    pieces: tuple[Piece, ...]
    encoded: Encoded
    divisor: torch.Tensor | None

    @property
    def bytes(self) -> int:
        return self.encoded.values.nbytes


class ShardWriter:
    """Writes states of the hook points that this rank can see to shards under temporary names.

    Args:
        folder: the store's folder, begun by ``session``. target: what it will be; the same on every rank.
        rank: of this process. done: states that are there already; they are passed over.
        nonfinite: ``refuse`` or ``keep`` infinite values and NaN. commit_secs: after this time what was written is made
            durable, so that a crash costs at most the work of that long. queue_bytes: of states that wait for the disk;
            ``write`` blocks beyond it. progressed: called whenever the disk has taken something.
        max_open_files: shards kept open at once. trace: is told of encoding, waiting, writing and syncing.

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
            files = _ShardFiles(folder, target, max_open_files)
            stack.callback(files.close)
            self._disk = _DiskThread(files, journal, commit_secs, queue_bytes, progressed, trace)
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
        self._check(hook_point, runs, values_nH)
        self._check_divisor(hook_point, len(values_nH), divisor_n)
        pieces = tuple(self._pieces(hook_point, runs))
        if pieces:
            dtype = self._target.dtype
            name, what = str(hook_point), "row" if self._target.states == self._target.rows else "state"
            with self._trace.span("encode", hook_point=hook_point, states=len(values_nH)):
                encoded = encode(
                    values_nH,
                    dtype,
                    nonfinite=self._nonfinite,
                    row_at=lambda index: f"{name} {what} {_state_at(runs, index)}",
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

    def _check(self, point: HookPoint, runs: Sequence[RowRun], values_nH: torch.Tensor) -> None:
        if point not in self._missing:
            raise ValueError(f"{point} is not one of the hook points of this store")
        if values_nH.device.type != "cpu" or not values_nH.dtype.is_floating_point:
            raise ValueError(f"values must be floats on the CPU, but are {values_nH.dtype} on {values_nH.device}")
        expected = (sum(run.length for run in runs), self._target.entry(point).width)
        if tuple(values_nH.shape) != expected:
            rule = f"must be {list(expected)}, as its entry and these runs say"
            raise ValueError(f"values of {point} {rule}, but are {list(values_nH.shape)}")
        for run in runs:
            if run.length < 0 or not 0 <= run.first_row <= run.first_row + run.length <= self._target.states:
                raise ValueError(f"states {run.first_row} + {run.length} do not lie within {self._target.states}")

    def _check_divisor(self, point: HookPoint, rows: int, divisor_n: torch.Tensor | None) -> None:
        expected = [rows] if self._target.entry(point).divisor else None
        found = None if divisor_n is None else list(divisor_n.shape)
        if found != expected:
            raise ValueError(f"divisors of {point} must be {expected}, as its entry says, but are {found}")
        if divisor_n is not None and (divisor_n.dtype != torch.float32 or divisor_n.device.type != "cpu"):
            raise ValueError(f"divisors must be float32 on the CPU, but are {divisor_n.dtype} on {divisor_n.device}")


class _ShardFiles:
    """Shards under temporary names, some of them open."""

    def __init__(self, folder: Path, target: Manifest, max_open: int) -> None:
        self._folder, self._target, self._max_open = folder, target, max_open
        self._open: OrderedDict[Shard, int] = OrderedDict()  # descriptors, least recently used first
        self._headers: dict[Shard, Header] = {}
        self._unsynced: dict[Shard, None] = {}

    def write(self, batch: Batch) -> dict[Shard, StoredError]:
        """Writes all states of a batch; what storing them cost, by shard, where it cost anything."""
        dtype, encoded = self._target.dtype, batch.encoded
        of_each_state = {SCALE: encoded.scale, DIVISOR: batch.divisor}
        columns = [(str(batch.point), self._target.entry(batch.point).width * dtype.bytes, row_bytes(encoded.values))]
        columns += [(name, 4, row_bytes(column)) for name, column in of_each_state.items() if column is not None]
        errors: dict[Shard, StoredError] = {}
        with naming_store(self._folder, str(batch.point)):
            for piece in batch.pieces:
                for number, state, size in self._target.grid.pieces(piece.first_state, piece.length):
                    shard, start = (batch.point, number), piece.index + state - piece.first_state
                    in_shard = state - self._target.grid.starts[number]
                    for name, item, data in columns:
                        self._put(shard, name, in_shard * item, data[start * item : (start + size) * item])
                    if encoded.error is not None:
                        add_error(errors, shard, StoredError.of(encoded.error[start : start + size]))
        return errors

    def sync(self) -> None:
        """Returns when everything written is durable."""
        for shard in list(self._unsynced):
            with naming_store(self._folder, str(shard[0])):
                os.fsync(self._descriptor(shard))
        self._unsynced.clear()

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _put(self, shard: Shard, tensor: str, offset: int, data: memoryview) -> None:
        if shard not in self._headers:
            self._headers[shard] = self._make(shard)
        write_all(self._descriptor(shard), data, self._headers[shard].offsets[tensor] + offset)
        self._unsynced[shard] = None

    def _make(self, shard: Shard) -> Header:
        """Makes the file unless another rank has.

        Every rank writes the same header and sets the same length, so it does not matter who comes first.
        ``posix_fallocate`` would reserve the space too, but where the file system lacks it glibc writes zeros into
        blocks that look empty, and can so wipe out what another rank writes at that moment.
        """
        start, header = header_of(shard, self._target)
        (self._folder / str(shard[0])).mkdir(exist_ok=True)
        descriptor = self._descriptor(shard, os.O_CREAT)
        os.ftruncate(descriptor, header.size_bytes)
        write_all(descriptor, start, 0)
        return header

    def _descriptor(self, shard: Shard, create: int = 0) -> int:
        """An open descriptor of the shard. Closing one to make place does not sync: ``sync`` opens it again, and
        the kernel reports a failed write-back to whoever syncs next."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1])
        path = self._folder / str(shard[0]) / (shard_name(shard[1]) + PARTIAL)
        self._open[shard] = os.open(path, create | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        return self._open[shard]


class _DiskThread:
    """Takes batches from a queue to the disk, and from time to time makes them durable and says so in the journal.

    What it raises is raised by every later call of ``put`` and ``finish``.
    """

    def __init__(
        self,
        files: _ShardFiles,
        journal: JournalWriter,
        commit_secs: float,
        queue_bytes: int,
        progressed: Callable[[], None],
        trace: Trace,
    ) -> None:
        self._files, self._journal, self._trace = files, journal, trace
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
                if batch is None or time.monotonic() - committed > self._commit_secs:
                    self._commit()
                    if batch is None and self._closing and not self._queue:
                        return
                    committed = time.monotonic()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._queue.clear()
                self._changed.notify_all()

    def _next(self, patience_secs: float | None) -> Batch | None:
        """The next batch; None where there is none in that time (None: however long), or no more will come. It counts
        as queued until it is written."""
        limit = None if patience_secs is None else max(0.0, patience_secs)
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing, limit)
            return self._queue[0] if self._queue else None

    def _write(self, batch: Batch) -> None:
        with self._trace.span("write", hook_point=batch.point, bytes=batch.bytes):
            errors = self._files.write(batch)
        for shard, error in errors.items():
            add_error(self._errors, shard, error)
        states = self._states.setdefault(batch.point, [])
        states += ((piece.first_state, piece.length) for piece in batch.pieces)
        with self._changed:
            self._queue.popleft()
            self._count(-batch.bytes)
        self._progressed()

    def _commit(self) -> None:
        if not self._states:
            return
        with self._trace.span("sync"):
            self._files.sync()
        self._progressed()
        durable = {point: RowSet(ranges) for point, ranges in self._states.items()}
        for point, states in durable.items():
            if len(states) != sum(length for _, length in self._states[point]):
                raise CoverageError(f"states of {point} were written more than once by one rank")
        with self._trace.span("journal"):
            self._journal.rows({point: states.ranges for point, states in durable.items()}, self._errors)
        self._states, self._errors = {}, {}


def _state_at(runs: Iterable[RowRun], index: int) -> int:
    """The state at ``index`` along the concatenated runs."""
    for run in runs:
        if index < run.length:
            return run.first_row + index
        index -= run.length
    raise IndexError(index)
