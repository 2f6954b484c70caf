"""What a fine-tuning run will do and take, before it does. Knows neither NeMo nor torch, and writes nothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nemo_qwen_hidden.config import BYTES
from nemo_qwen_hidden.data.tokenizer import TOKENIZER_FILES
from nemo_qwen_hidden.drift.probe_set import PHASE
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.plan.shapes import state_width
from nemo_qwen_hidden.plan.training import microbatches_of, steps_of
from nemo_qwen_hidden.plan.training_memory import RankMemory, Training, checkpoint_bytes, rank_memory
from nemo_qwen_hidden.progress import silent
from nemo_qwen_hidden.store.captured import step_bytes
from nemo_qwen_hidden.store.format import DTYPES, human_bytes
from nemo_qwen_hidden.store.write.place import disk_of
from nemo_qwen_hidden.training.job import CHECKPOINTS, FinetuningJob
from nemo_qwen_hidden.training.texts import Counts, count, probe_lengths
from nemo_qwen_hidden.training.watch.schedule import TRAIN, VALIDATION

_CONTEXT_BYTES = 60_000  # of a checkpoint: NeMo's configuration of model, trainer and data; seen


@dataclass(frozen=True, kw_only=True)
class Captured:
    """Captured steps of one phase. steps: their numbers. documents, rows: of each, samples or documents and their
    tokens."""

    phase: str
    steps: range
    documents: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A store of the run. setting: that names it. bytes: that it has when the run has ended, of the steps from the one
    that the run begins with or goes on from."""

    setting: str
    path: Path
    captured: tuple[Captured, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the run writes, of what there is not yet. setting: that names where."""

    setting: str
    path: Path
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Disk:
    """needs: all that the run writes to it. free: bytes."""

    needs: tuple[Need, ...]
    free: int

    @property
    def needed(self) -> int:
        """Bytes, of all."""
        return sum(need.bytes for need in self.needs)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """counts: of the data; None where they were not read. probe: tokens of each document of the probe set."""

    job: FinetuningJob
    counts: Counts | None
    probe: Sequence[int]

    @cached_property
    def first_step(self) -> int:
        """Steps that are done: of the checkpoint that the run goes on from, else 0."""
        return step_of(self.job.checkpoints[-1]) if self.job.begun else 0

    @property
    def microbatches(self) -> int:
        """Of a replica, in a step."""
        train = self.job.settings.train
        return microbatches_of(
            self.job.topology, global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size
        )

    @property
    def validation_samples(self) -> int:
        """Of one validation, which takes whole global batches; where the data were not read, as many as are asked
        for, and none where all are."""
        train = self.job.settings.train
        if not train.validation_part:
            return 0
        there = math.inf if self.counts is None else self.counts.validation // train.global_batch_size
        asked = math.inf if train.validation_batches is None else train.validation_batches
        batches = min(there, asked)
        return 0 if batches == math.inf else int(batches) * train.global_batch_size

    @property
    def validations(self) -> range:
        """Steps after which there is one."""
        train = self.job.settings.train
        every = min(train.validation_every, train.max_steps)
        return steps_of(self.first_step + 1, train.max_steps if train.validation_part else 0, every)

    @property
    def stores(self) -> tuple[Stored, ...]:
        """That the run writes."""
        watch, train, first = self.job.settings.watch, self.job.settings.train, self.first_step
        found = []
        if watch.store is not None:
            seen, samples = self.validations, self.validation_samples
            validated = steps_of(first + 1, seen[-1], math.lcm(seen.step, watch.every)) if seen else range(0)
            phases = (
                (TRAIN, steps_of(first, train.max_steps - 1, watch.every), train.global_batch_size),
                (VALIDATION, validated, samples),
            )
            captured = tuple(
                Captured(phase=phase, steps=steps, documents=size, rows=size * train.seq_length)
                for phase, steps, size in phases
                if phase in watch.phases and steps and size
            )
            found.append(self._store("watch.store", watch.store, captured))
        if watch.probe_store is not None:
            steps = steps_of(first, train.max_steps if first < train.max_steps else 0, watch.every)
            probed = Captured(phase=PHASE, steps=steps, documents=len(self.probe), rows=sum(self.probe))
            found.append(self._store("watch.probe_store", watch.probe_store, (probed,)))
        return tuple(found)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, about."""
        job = self.job
        numbers = checkpoint_bytes(
            job.architecture.shape,
            tied=job.architecture.tied,
            tp=job.topology.tp,
            itemsize=self._itemsize,
            lora_dim=job.settings.train.lora_dim,
        )
        files = (job.tokenizer_folder / name for name in TOKENIZER_FILES) if job.has_tokenizer else ()
        return numbers + _CONTEXT_BYTES + sum(file.stat().st_size for file in files if file.is_file())

    @property
    def checkpoints(self) -> tuple[int, int]:
        """How many there are when the run has ended, and at most while it runs: a checkpoint is written before the one
        that it replaces is deleted."""
        train = self.job.settings.train
        made = train.max_steps // train.checkpoint_every
        kept = min(train.keep_checkpoints, made) + 1
        return kept, kept + (train.max_steps > train.checkpoint_every)

    @property
    def block_bytes(self) -> int:
        """Of the data as blocks of tokens; 0 where they were not read, or are there."""
        counts = self.counts
        sequences = 0 if counts is None or counts.documents is None else counts.train + counts.validation
        return sequences * (self.job.settings.train.seq_length + 1) * np.dtype(np.int32).itemsize

    @cached_property
    def memory(self) -> tuple[RankMemory, ...]:
        """Of a rank at each place of the pipeline."""
        job, train = self.job, self.job.settings.train
        run = Training(
            shape=job.architecture.shape,
            topology=job.topology,
            stages=job.stages,
            tied=job.architecture.tied,
            itemsize=self._itemsize,
            seq_length=train.seq_length,
            micro_batch_size=train.micro_batch_size,
            microbatches=self.microbatches,
            recompute=train.recompute,
            recompute_layers=train.recompute_layers,
            lora_dim=train.lora_dim,
            points=job.points,
            captured_rows=[max((each.rows for each in store.captured), default=0) for store in self.stores],
            captured_itemsize=self._itemsize if self._stored_dtype == "int8" else BYTES[self._stored_dtype],
        )
        return tuple(rank_memory(run, rank) for rank in range(job.topology.pp))

    @property
    def disks(self) -> tuple[Disk, ...]:
        """That the run writes to. Raises ``StoreError`` where no folder can be."""
        most = self.checkpoints[1] * self.checkpoint_bytes
        there = _size(self.job.run_path / CHECKPOINTS)
        needs = [Need(setting="run.path", path=self.job.run_path, bytes=max(0, most - there) + self.block_bytes)]
        needs += [Need(setting=store.setting, path=store.path, bytes=store.bytes) for store in self.stores]
        on = [_disk_of(need) for need in needs]
        return tuple(
            Disk(needs=tuple(need for need, each in zip(needs, on, strict=True) if each[0] == disk), free=free)
            for disk, free in dict(on).items()
        )

    def check_disks(self) -> None:
        """Whether each has room for what the run writes.

        Raises:
            StoreError: one has not; says how much is needed and how much is free.
        """
        for disk in self.disks:
            if disk.needed > disk.free:
                largest = max(disk.needs, key=lambda need: need.bytes)
                what = ", ".join(f"{human_bytes(need.bytes)} for `{need.setting}`" for need in disk.needs)
                rule = f"must be on a disk with {human_bytes(disk.needed)} free ({what})"
                rule = f"{rule}, and {human_bytes(disk.free)} are free there"
                raise StoreError(largest.setting, rule, str(largest.path))

    @property
    def _itemsize(self) -> int:
        return BYTES[self.job.settings.precision.compute]

    @property
    def _stored_dtype(self) -> str:
        precision = self.job.settings.precision
        return precision.stored or precision.compute

    def _store(self, setting: str, path: str, captured: tuple[Captured, ...]) -> Stored:
        shape, dtype = self.job.architecture.shape, DTYPES[self._stored_dtype]
        widths = [state_width(point, shape, keys=self.job.settings.train.seq_length) for point in self.job.points]
        size = sum(
            len(each.steps) * step_bytes(widths, rows=each.rows, documents=each.documents, dtype=dtype)
            for each in captured
        )
        return Stored(setting=setting, path=Path(path).expanduser(), captured=captured, bytes=size)


def outlook(job: FinetuningJob, told: Callable[[int], None] = silent) -> Outlook:
    """With the data, which are read. told: of the tokens that were counted so far.

    Raises:
        DataError: documents that cannot be used, or too few. CheckpointError: there is no tokenizer, and one is needed.
    """
    return Outlook(job=job, counts=count(job, told), probe=probe_lengths(job))


def outline(job: FinetuningJob) -> Outlook:
    """Without the data of the run; those of a probe set are read. Raises as ``outlook``."""
    return Outlook(job=job, counts=None, probe=probe_lengths(job))


def step_of(checkpoint: Path) -> int:
    """Steps that were done when it was made. NeMo counts them in its name from 0."""
    return int(checkpoint.name.removeprefix("step=").removesuffix("-last")) + 1


def _disk_of(need: Need) -> tuple[int, int]:
    try:
        return disk_of(need.path)
    except StoreError as error:
        raise StoreError(need.setting, error.rule, error.value) from error


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
