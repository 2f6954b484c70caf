"""Measures shards while others are written: those that one writer has filled alone, which it knows by itself to be
whole. What several ranks have filled is left to ``session.seal_shards``."""

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.entries import ShardEntry
from nemo_qwen_hidden.store.format import Shard
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.statistics import StoredError
from nemo_qwen_hidden.store.write.seal import measure
from nemo_qwen_hidden.store.write.shard_files import Written
from nemo_qwen_hidden.trace.record import UNTRACED, Trace

_LOWEST_PRIORITY = 19


@dataclass(kw_only=True)
class _Filling:
    """What has been written of a shard. error: what storing that cost."""

    pieces: list[tuple[int, int]] = field(default_factory=list)
    states: int = 0
    error: StoredError | None = None

    def add(self, written: Written) -> None:
        self.pieces.append((written.first_state, written.states))
        self.states += written.states
        if written.error is not None:
            self.error = written.error if self.error is None else self.error + written.error


class Sealer:
    """Is told of everything that is written, and reads shards back as they become whole.

    One thread does so from the start, and gets only time that nothing else wants: where computing takes all processors
    the shards wait for ``hurry``. All methods are for one thread, and raise what has failed in the others.

    Args:
        threads: that read shards at a time after ``hurry``; 0: no shard is read. progressed: called after each shard.
        trace: is told of each shard.
    """

    def __init__(
        self, folder: Path, target: Manifest, *, threads: int, progressed: Callable[[], None], trace: Trace = UNTRACED
    ) -> None:
        self._folder, self._target, self._progressed, self._trace = folder, target, progressed, trace
        self._filling: dict[Shard, _Filling] = {}
        self._whole: SimpleQueue[tuple[Shard, StoredError | None] | None] = SimpleQueue()
        self._measured: deque[tuple[Shard, ShardEntry]] = deque()
        self._most, self._threads, self._abandoned = threads, list[threading.Thread](), False
        self._failure: BaseException | None = None
        if threads:
            self._start(self._run_in_background)

    def written(self, written: Written) -> None:
        """These states are in their file, durable or not."""
        if not self._most:
            return
        shard = written.shard
        filling = self._filling.setdefault(shard, _Filling())
        filling.add(written)
        size = len(self._target.grid.states_of(shard[1]))
        if filling.states >= size and len(RowSet(filling.pieces)) == size:
            del self._filling[shard]
            self._whole.put((shard, filling.error))

    def measured(self) -> dict[Shard, ShardEntry]:
        """Shards that have been read since the last call; what was added to their files is not durable yet."""
        if self._failure is not None:
            raise self._failure
        return dict(self._measured.popleft() for _ in range(len(self._measured)))

    def hurry(self) -> None:
        """Nothing more will be written: all threads may be used."""
        for _ in range(self._most - 1):
            self._start(self._run)

    def finish(self) -> None:
        """Returns when all whole shards have been read and no thread is left."""
        self._end()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Ends the threads, whatever is left."""
        self._abandoned = True
        self._end()

    def _end(self) -> None:
        for _ in self._threads:
            self._whole.put(None)
        while self._threads:
            self._threads.pop().join()

    def _start(self, run: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=run, name="sealer", daemon=True))
        self._threads[-1].start()

    def _run_in_background(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)  # on Linux of this thread alone
        self._run()

    def _run(self) -> None:
        try:
            while (found := self._whole.get()) is not None and not self._abandoned:
                shard, error = found
                with self._trace.span("seal", hook_point=shard[0], shard=shard[1]):
                    entry = measure(self._folder, self._target, shard, error, durable=False)
                self._measured.append((shard, entry))
                self._progressed()
        except BaseException as failure:
            self._failure = failure
