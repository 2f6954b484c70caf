"""States of captured steps, from all ranks of a training run into a store, while training goes on.

The training thread only hands over what it has. A thread of each rank does the rest, together with those of the others
over a process group that nothing else uses: rank 0 learns of the samples and begins the step in the store, each rank
writes the rows that it holds, the shards are sealed by turns, and rank 0 adds the step. Neither random numbers nor the
groups of the training are touched.
"""

import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from nemo_qwen_hidden.errors import HiddenStatesError, StoreError, status_of
from nemo_qwen_hidden.parallel.agree import gather_values, on_every_rank, on_rank_0
from nemo_qwen_hidden.parallel.groups import CONTROL_TIMEOUT_DAYS, ProcessGroups
from nemo_qwen_hidden.parallel.watch import wait_for_thread
from nemo_qwen_hidden.plan.training_memory import QUEUE_BYTES, STEPS_AHEAD
from nemo_qwen_hidden.store.captured import SHARD_ROWS, CapturedStep, captured_steps, consecutive
from nemo_qwen_hidden.store.entries import ShardEntry
from nemo_qwen_hidden.store.format import MARKER, Shard
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.write.step_files import Share, StepFiles, check_shares
from nemo_qwen_hidden.store.write.steps import GrowingStore
from nemo_qwen_hidden.training.watch.step_states import Sample, StepPlan, StepStates, together

COMMIT_SECS = 5.0
_ENDING_SECS = 5.0


class _Flush:
    """Stands in the queue for: everything before is to be durable, and known to the manifest."""


class Recorder:
    """One rank's part in the store of a training run; made and closed by all ranks together, as every call.

    Args:
        path: the store's folder, which all ranks see. what: the store without parts, see ``describe``; rank 0's counts.
        groups: of the training run; their ranks are asked, their groups are not used. resume_at, staying, begins: as
            of ``GrowingStore``. queue_bytes: of states that wait; ``put`` blocks beyond it, or when ``STEPS_AHEAD``
            steps do. commit_secs: after this time the next step makes all durable, so that a power cut costs at most
            the work of that long. nonfinite: ``refuse`` or ``keep`` infinite values and NaN.

    Raises:
        StoreError: the folder cannot be the store of this run, or some rank does not see it.
        PeerError: on the other ranks.
    """

    def __init__(
        self,
        path: Path,
        what: Manifest,
        groups: ProcessGroups,
        *,
        resume_at: int | None = None,
        staying: Collection[str] = (),
        begins: bool = False,
        shard_rows: int = SHARD_ROWS,
        queue_bytes: int = QUEUE_BYTES,
        commit_secs: float = COMMIT_SECS,
        nonfinite: str = "refuse",
    ) -> None:
        self._path, self._what, self._commit_secs, self._queue_bytes = path, what, commit_secs, queue_bytes
        own = dist.new_group(backend="gloo", timeout=timedelta(days=CONTROL_TIMEOUT_DAYS))
        self._groups = replace(groups, control=own)
        self._store: GrowingStore | None = None  # on rank 0
        self._files: StepFiles | None = None

        def begin() -> tuple[Manifest, str]:
            self._store = GrowingStore(
                path, what, resume_at=resume_at, staying=staying, begins=begins, shard_rows=shard_rows
            )
            return self._store.manifest, _digest(path)

        try:
            begun, marker = on_rank_0(begin, self._groups, status_of=status_of)
            self._files = self._open(begun, marker, nonfinite)
        except BaseException:
            self._release()
            raise
        self._found = {(step.phase, step.step) for _, step in captured_steps(begun.parts, str(path))}
        self._committed = -math.inf
        self._late: BaseException | None = None
        self._changed = threading.Condition()
        self._queue: deque[StepStates | _Flush | None] = deque()
        self._queued_bytes = self._given = self._done = 0
        self._failure: BaseException | None = None
        self._failed_at = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def found(self, phase: str, step: int) -> bool:
        """Whether the store held a step when it was opened."""
        return (phase, step) in self._found

    def put(self, states: StepStates) -> None:
        """Takes what this rank has of a step, whose tensors are not to be changed afterwards. Every rank puts the same
        steps in the same order, what it has of them or nothing.

        Raises:
            StoreError: of an earlier step: no space is left, or a value is not finite, or the store has the step.
            PeerError: the same on another rank. Both are raised at the same call on all ranks.
        """
        size = states.nbytes
        with self._changed:
            self._give(states, ahead=STEPS_AHEAD, size=size)

    def flush(self) -> None:
        """Returns when every step is durable, and a store is there that lists it: for a checkpoint, since a run that is
        resumed from it does later steps again, and no earlier one. Raises as ``put``."""
        with self._changed:
            self._give(_Flush(), ahead=0)

    def close(self) -> None:
        """``flush``, and lets go of the store; a second call does nothing. Raises as ``put``."""
        if not self._thread.is_alive() and self._failure is None:
            return
        try:
            self.flush()
            with self._changed:
                self._give(None, ahead=0)
            wait_for_thread(self._thread, self._thread.join)
            assert self._files is not None
            on_every_rank(self._files.close, self._groups, status_of=status_of)
            on_rank_0(self._finish, self._groups, status_of=status_of)
        finally:
            self._release()

    def abandon(self) -> None:
        """Lets go without waiting for other ranks, after an error; what is not in the store is lost. The one call that
        is not for all ranks together."""
        with self._changed:
            self._failure = self._failure or HiddenStatesError("the recorder was abandoned")
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(_ENDING_SECS)  # it may wait for a rank that does not come any more
        if not self._thread.is_alive():
            self._release()

    # the training thread

    def _give(self, item: StepStates | _Flush | None, *, ahead: int, size: int = 0) -> None:
        """Queues ``item`` and waits until no more than ``ahead`` items are waiting or being worked on.

        An error is raised where the item that it was met at has to be done, and so at the same call on every rank,
        however far each rank's thread has come: if one rank left its training step and another went on into the next,
        the other would wait for it in a collective.
        """
        if self._failure is None:
            self._wait_for(lambda: self._queued_bytes + size <= self._queue_bytes or self._idle)
            self._queue.append(item)
            self._queued_bytes += size
            self._changed.notify_all()
        self._given += 1
        due = self._given - ahead
        self._wait_for(lambda: self._done >= due or self._failure is not None)
        if self._failure is not None and self._failed_at < due:
            raise self._failure

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """For the recorder's thread, which may be long over a step where the disk is slow."""
        wait_for_thread(self._thread, lambda: self._changed.wait_for(condition))

    @property
    def _idle(self) -> bool:
        """Whether nothing would make place in the queue."""
        return not self._queue or self._failure is not None

    # the recorder's thread

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._failure is not None)
                    if self._failure is not None:
                        return
                    item = self._queue[0]
                if isinstance(item, StepStates):
                    self._record(item)
                elif item is not None:
                    self._flush()
                with self._changed:
                    if self._failure is None:
                        self._queue.popleft()
                        self._queued_bytes -= item.nbytes if isinstance(item, StepStates) else 0
                    self._done += 1
                    self._changed.notify_all()
                if item is None:
                    return
        except BaseException as failure:
            with self._changed:
                self._failure, self._failed_at = self._failure or failure, self._done
                self._queue.clear()
                self._changed.notify_all()

    def _record(self, states: StepStates) -> None:
        """One step into the store. Collective over all ranks."""
        groups = self._groups
        told = gather_values((states.phase, states.step, states.samples, len(states.slices)), groups)
        plan = on_rank_0(lambda: self._plan(told), groups, status_of=status_of)
        if plan is None:
            return
        begun, files = plan.begun, self._files
        assert files is not None

        def write() -> Share:
            return files.write(begun, plan.pieces(states.slices))

        shares = on_every_rank(write, groups, status_of=status_of)
        errors, shards = check_shares(begun.target, shares), list(begun.target.missing())

        def seal() -> Mapping[Shard, ShardEntry]:
            return files.seal(begun, shards[groups.place.rank :: groups.topology.world], errors)

        sealed = on_every_rank(seal, groups, status_of=status_of)
        if plan.sync:  # when shards of all ranks have their names
            on_every_rank(files.sync, groups, status_of=status_of)
        if self._store is not None:
            entries = {shard: entry for each in sealed for shard, entry in each.items()}
            self._add(entries, commits=plan.sync)

    def _flush(self) -> None:
        """Collective over all ranks."""
        assert self._files is not None
        on_every_rank(self._files.sync, self._groups, status_of=status_of)
        on_rank_0(lambda: self._commit(publish=True), self._groups, status_of=status_of)

    def _plan(self, told: Sequence[tuple[str, int, Sequence[Sample], int]]) -> StepPlan | None:
        """Begins a step on rank 0; None where no rank has a sample. told: by each rank, the step, its samples, and how
        many slices it has."""
        if self._late is not None:
            raise self._late
        assert self._store is not None
        steps = sorted({(phase, step) for phase, step, _, _ in told})
        if len(steps) > 1:
            raise HiddenStatesError(f"ranks have captured different steps at the same time: {steps}")
        samples = together(samples for _, _, samples, _ in told)
        if not samples:
            if any(slices for *_, slices in told):
                raise HiddenStatesError(f"states of step {steps[0]} were captured, and no rank has told of a sample")
            return None
        phase, step = steps[0]
        captured = CapturedStep(phase=phase, step=step, samples=consecutive([sample.number for sample in samples]))
        begun = self._store.begin(captured, [sample.document(phase) for sample in samples])
        return StepPlan.of(begun, samples, sync=time.monotonic() - self._committed >= self._commit_secs)

    def _add(self, sealed: Mapping[Shard, ShardEntry], *, commits: bool) -> None:
        """On rank 0 alone; what goes wrong here reaches all ranks with the next step."""
        assert self._store is not None
        try:
            self._store.add(sealed)
            if commits:
                self._commit()
        except BaseException as failure:
            self._late = failure

    def _commit(self, *, publish: bool = False) -> None:
        if self._late is not None:
            raise self._late
        assert self._store is not None
        self._store.commit(publish=publish)
        self._committed = time.monotonic()

    def _open(self, begun: Manifest, marker: str, nonfinite: str) -> StepFiles:
        """Lets this rank write, if every rank sees the store. Collective over all ranks."""
        opened: list[StepFiles] = []

        def see() -> None:
            if not (self._path / MARKER).is_file() or _digest(self._path) != marker:
                rule = "must be a folder that every rank sees, on a file system that all machines share"
                raise StoreError("store.path", rule, str(self._path))
            opened.append(StepFiles(self._path, begun.producers, nonfinite=nonfinite))

        on_every_rank(see, self._groups, status_of=status_of)
        return opened[0]

    def _finish(self) -> None:
        assert self._store is not None
        self._store.finish()

    def _release(self) -> None:
        if self._files is not None:
            self._files.close()
        if self._store is not None:
            self._store.abandon()


def _digest(path: Path) -> str:
    return hashlib.sha256((path / MARKER).read_bytes()).hexdigest()
