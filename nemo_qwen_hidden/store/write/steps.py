"""A store that grows by one part for each captured step of a training run.

Rank 0 holds the ``GrowingStore``, every rank a ``StepFiles``, and for each step, in this order:

    rank 0       begin      the documents of the step: its token table, and the ``StepTarget`` for all ranks
    every rank   write      the rows that it holds, of any rank's shards
    every rank   seal       its share of the shards, once all have written
    rank 0       add        the step is part of the store

Until it is added, a step is a store of one part in ``journal/staged``, since nothing that is written depends on the
parts before it; so a step costs the same however many there are. What is added stands in the journal. From time to time
everything is made durable (``sync`` on every rank, then ``commit`` on rank 0), and less often, as it grows with the
store, the manifest is written anew. Whoever opens the store after a crash believes a line of the journal where the
files are as it says: an ended process costs the step that it was at, a power cut those since the last commit, and
neither the truth.
"""

import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import CoverageError, StoreError, raise_all
from nemo_qwen_hidden.store.captured import SHARD_ROWS, CapturedStep, captured_steps
from nemo_qwen_hidden.store.entries import FileEntry, Part, ShardEntry
from nemo_qwen_hidden.store.files import naming_store, sync_files, sync_folder
from nemo_qwen_hidden.store.format import JOURNAL, STAGED, TOKENS, Shard
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.table import lines_name, table_name
from nemo_qwen_hidden.store.write import journal, place, session
from nemo_qwen_hidden.store.write.journal import Added, JournalWriter
from nemo_qwen_hidden.store.write.step_files import StepTarget
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter

MANIFEST_SHARE = 0.01
"""Of the time of a run, the most that goes into writing the manifest anew, but where it is asked for."""


@dataclass(frozen=True, kw_only=True)
class StepDocument:
    """One sample of a step. id: beneath that of the step. token_ids: int32 [tokens]. kept: int64, the places of the
    tokens whose states are stored, ascending; None: all, of every sample of every step or of none."""

    id: str
    source: str
    token_ids: NDArray[np.int32]
    kept: NDArray[np.int64] | None = None


class GrowingStore:
    """The store at ``path``, open for more steps; held by one process.

    Args:
        what: a manifest without parts: hook points, sizes, dtypes, and who produces. resume_at: steps from this one on
            are dropped, since the run does them again; None drops none. staying: phases whose step ``resume_at`` stays:
            the run has done it before it came there, with the weights that it goes on with. begins: no step above 0 may
            be there, which would be of another run. shard_rows: states of one shard.

    A context manager: ``finish`` where the block ends, and where it raises everything is left to the next that opens
    the store.

    Raises:
        StoreError: another process works on the store; it was made with other settings, or is not one of captured
            steps; or the folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        what: Manifest,
        *,
        resume_at: int | None = None,
        staying: Collection[str] = (),
        begins: bool = False,
        shard_rows: int = SHARD_ROWS,
    ) -> None:
        if what.parts or any(entry.shards for entry in what.hook_points):
            raise ValueError("what the store is must be said by a manifest without parts and shards")
        self.path, self._what, self._shard_rows = path, what, shard_rows
        with ExitStack() as stack:
            stack.enter_context(place.locked(path))
            self._base = manifest = self._open(resume_at, staying, begins=begins)
            stack.callback(session.discard, path)
            self._parts = list(manifest.parts)
            self._shards = {entry.point: list(entry.present) for entry in manifest.hook_points}
            self._steps = {(s.phase, s.step) for _, s in captured_steps(self._parts, str(path))}
            self._states = manifest.states
            for folder in (TOKENS, *map(str, manifest.points)):
                (path / folder).mkdir(exist_ok=True)
            (path / JOURNAL / STAGED).mkdir()
            self._journal = JournalWriter(path, 0)
            stack.callback(self._journal.close)
            self._begun: StepTarget | None = None
            self._uncommitted: list[Part] = []
            self._published, self._publishing_secs, self._listed = -np.inf, 0.0, len(self._parts)
            self._resources = stack.pop_all()

    @property
    def producers(self) -> tuple[Mapping[str, Any], ...]:
        """Who has worked on the store, this run last."""
        return self._base.producers

    @property
    def manifest(self) -> Manifest:
        """Of all steps that were added."""
        points = tuple(replace(entry, shards=tuple(self._shards[entry.point])) for entry in self._base.hook_points)
        return replace(self._base, parts=tuple(self._parts), hook_points=points)

    def begin(self, step: CapturedStep, documents: Sequence[StepDocument]) -> StepTarget:
        """The part that ``step`` is to be: writes its token table. At least one document.

        Raises:
            StoreError: the store holds the step, or a later one; or no space is left.
        """
        self._check_new(step)
        if not documents:
            raise ValueError("a step needs a document")
        staged = self.path / JOURNAL / STAGED
        with TokenTableWriter(
            staged, shard_rows=self._shard_rows, durable=False, metadata={"step": str(step)}
        ) as table:
            for each in documents:
                table.append(
                    document_id=f"{step}/{each.id}", source=each.source, token_ids=each.token_ids, kept=each.kept
                )
            part = replace(table.close(), data=step.as_data())
        if self._parts and (part.kept is None) != (self._parts[0].kept is None):
            raise ValueError("kept must be given with every document of a store, or with none")
        target = replace(self._what, parts=(part,))
        missing = (None,) * target.grid.shards
        target = replace(target, hook_points=tuple(replace(entry, shards=missing) for entry in target.hook_points))
        self._begun = StepTarget(
            number=len(self._parts),
            target=target,
            first_shard=len(self._shards[target.points[0]]),
            first_state=self._states,
        )
        return self._begun

    def add(self, shards: Mapping[Shard, ShardEntry]) -> None:
        """The step that was begun is part of the store: all its shards, by their numbers in it, are sealed.

        Raises:
            CoverageError: a shard is not.
        """
        begun = self._begun
        assert begun is not None, "add follows begin"
        missing = [shard for shard in begun.target.missing() if shard not in shards]
        if missing:
            raise CoverageError(f"shard {missing[0][1]} of {missing[0][0]} of a captured step is not there")
        part = self._move_table(begun)
        for point in begun.target.points:
            numbers = range(begun.target.grid.shards)
            self._shards[point] += [shards[point, number] for number in numbers]
        self._parts.append(part)
        self._steps.add((part.data["phase"], part.data["step"]))
        self._states += part.states
        self._begun = None
        named = {(point, begun.first_shard + number): entry for (point, number), entry in shards.items()}
        self._journal.added(Added(number=begun.number, part=part, shards=named))
        self._uncommitted.append(part)

    def commit(self, *, publish: bool = False) -> None:
        """Makes what was added durable; called when every rank has come back from ``StepFiles.sync``.

        Args:
            publish: write the manifest in any case, so that who opens the store finds all steps.
        """
        with naming_store(self.path, TOKENS):
            sync_files(self.path / file.file for part in self._uncommitted for file in (part.tokens, part.lines))
            if self._uncommitted:
                sync_folder(self.path / TOKENS)
        self._journal.sync()
        self._uncommitted.clear()
        since = time.monotonic() - self._published
        if len(self._parts) > self._listed and (publish or since * MANIFEST_SHARE > self._publishing_secs):
            self._publish()

    def finish(self) -> Manifest:
        """Ends the work on the store; called when every rank has come back from ``StepFiles.sync`` and closed it. A
        store without a step is none: what was made of it goes."""
        with self._resources:
            self.commit(publish=True)
            if self._parts:
                session.end(self.path)
        return self.manifest

    def abandon(self) -> None:
        """Leaves everything to the next that opens the store; does nothing after ``finish``."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def _publish(self) -> None:
        start = time.monotonic()
        session.publish_manifest(self.path, self.manifest)
        self._published = time.monotonic()
        self._publishing_secs, self._listed = self._published - start, len(self._parts)

    def _open(self, resume_at: int | None, staying: Collection[str], *, begins: bool) -> Manifest:
        """What stays of the store, whose folder holds that alone afterwards."""
        found = session.find(self.path)
        there = found.finished or found.unfinished
        if there is None:
            whole = replace(self._what, producers=())
        else:
            _check(self.path, there, found, self._what)
            whole = _with_added(self.path, there, journal.read(self.path).added)
        last = max((step.step for _, step in captured_steps(whole.parts, str(self.path))), default=0)
        if begins and last > 0:
            rule = f"must be a new folder where training begins; this one has steps up to {last}, of another run"
            raise StoreError("store.path", rule, str(self.path))
        kept = _before(whole, resume_at, staying, self.path)
        kept = replace(kept, producers=(*kept.producers, *self._what.producers))
        shutil.rmtree(self.path / JOURNAL / STAGED, ignore_errors=True)
        session.grow(self.path, whole, kept)
        return kept

    def _check_new(self, step: CapturedStep) -> None:
        if (step.phase, step.step) in self._steps:
            raise StoreError("step", f"must be one that the store at {self.path} does not hold yet", str(step))
        last = max((number for _, number in self._steps), default=0)
        if step.step < last:
            raise StoreError("step", f"must be at least {last}, the last of the store at {self.path}", str(step))

    def _move_table(self, begun: StepTarget) -> Part:
        """The part of a step, as the whole store numbers it, with its files in their places."""
        (part,) = begun.target.parts
        last = self._parts[-1] if self._parts else None
        files = {"tokens": table_name(begun.number), "lines": lines_name(begun.number)}
        with naming_store(self.path, TOKENS):
            for name, place in files.items():
                os.rename(self.path / JOURNAL / STAGED / getattr(part, name).file, self.path / place)
        return replace(
            part,
            first_row=0 if last is None else last.first_row + last.rows,
            first_document=0 if last is None else last.first_document + last.documents,
            tokens=replace(part.tokens, file=files["tokens"]),
            lines=replace(part.lines, file=files["lines"]),
        )


def _check(path: Path, there: Manifest, found: session.Found, what: Manifest) -> None:
    """Whether the store that is there can take steps of ``what``."""
    ours = {number for number, _ in captured_steps(there.parts, str(path))}
    if len(ours) < len(there.parts) or (found.unfinished is not None and not found.grows):
        rule = "must be a new folder, or a store of captured steps; an extraction's is there"
        raise StoreError("store.path", rule, str(path))
    described = ((name, value, _described(what)[name]) for name, value in _described(there).items())
    raise_all(
        [
            StoreError(name, f"must be {old!r}, as in the store at {path}", new)
            for name, old, new in described
            if old != new and not (name in _NOT_ALWAYS_KNOWN and None in (old, new))
        ]
    )


_NOT_ALWAYS_KNOWN = ("model.weights_sha256", "model.architecture", "tokenizer.sha256")


def _described(manifest: Manifest) -> dict[str, object]:
    """What all steps of a store share."""
    return {
        "hidden_size": manifest.hidden_size,
        "dtypes.compute": manifest.compute_dtype,
        "dtypes.stored": manifest.stored_dtype,
        "pooling": manifest.pooling,
        "hook_points": [
            (str(entry.point), entry.norm, entry.shape, entry.heads, entry.divisor) for entry in manifest.hook_points
        ],
        "model.weights_sha256": manifest.model.get("weights_sha256"),
        "model.architecture": manifest.model.get("architecture"),
        "model.adapter": manifest.model.get("adapter"),
        "tokenizer.sha256": manifest.tokenizer.get("sha256"),
    }


def _with_added(path: Path, listed: Manifest, added: Mapping[int, Added]) -> Manifest:
    """A store with the parts that its journal has beside those of its manifest, up to the first whose files are not as
    the journal says; they are durable now."""
    parts, shards = [*listed.parts], {entry.point: [*entry.present] for entry in listed.hook_points}
    folders = set()
    while (each := added.get(len(parts))) is not None:
        files: list[FileEntry | ShardEntry] = [each.part.tokens, each.part.lines, *each.shards.values()]
        if not all(_is_whole(path / file.file, file.bytes, file.sha256) for file in files):
            break
        parts.append(each.part)
        for (point, _), entry in sorted(each.shards.items(), key=lambda item: item[0][1]):
            shards[point].append(entry)
        folders |= {(path / file.file).parent for file in files}
    for folder in folders:
        sync_folder(folder)
    points = tuple(replace(entry, shards=tuple(shards[entry.point])) for entry in listed.hook_points)
    return replace(listed, parts=tuple(parts), hook_points=points)


def _is_whole(path: Path, size: int, sha256: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "r+b", buffering=0) as file:
        if file_digest(file, "sha256").hexdigest() != sha256:
            return False
        os.fsync(file.fileno())
    return True


def _before(whole: Manifest, resume_at: int | None, staying: Collection[str], path: Path) -> Manifest:
    """The steps of a store that come before ``resume_at``, which have to be the first."""
    steps = [step for _, step in captured_steps(whole.parts, str(path))]
    below = [
        resume_at is None or each.step < resume_at or (each.step == resume_at and each.phase in staying)
        for each in steps
    ]
    count = sum(below)
    if not all(below[:count]):
        rule = f"must hold its steps below {resume_at} before the others, to go on from there"
        raise StoreError("store.path", rule, str(path))
    shards = whole.grid.of_part(count - 1).stop if count else 0
    points = tuple(replace(entry, shards=entry.shards[:shards]) for entry in whole.hook_points)
    return replace(whole, parts=whole.parts[:count], hook_points=points)
