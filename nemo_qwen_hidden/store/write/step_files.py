"""One rank's part in a store that grows by captured steps: its states to their places, its share of the shards sealed.

``steps`` says in which order this is called. Nothing here knows other ranks: what they have to tell each other, a
``Share`` of each and the ``ShardEntry`` of each shard, is returned.

Legend: n states of one call, H numbers in each.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_qwen_hidden.errors import CoverageError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.entries import ShardEntry
from nemo_qwen_hidden.store.files import naming_store, sync_files, sync_folder
from nemo_qwen_hidden.store.format import JOURNAL, STAGED, Shard, shard_name
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.statistics import StoredError, add_error
from nemo_qwen_hidden.store.write.encode import encode
from nemo_qwen_hidden.store.write.locks import rank_lock
from nemo_qwen_hidden.store.write.seal import measure, partial_path
from nemo_qwen_hidden.store.write.shard_files import Batch, Piece, ShardFiles
from nemo_qwen_hidden.store.write.writer import RowRun, check_values, state_name

_MAX_OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class StepTarget:
    """What all ranks need to know of a step. number: of its part. target: the step alone, as a store of one part.
    first_shard, first_state: the numbers that its own 0 will have in the store."""

    number: int
    target: Manifest
    first_shard: int
    first_state: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank has written of a step. states: (first, count) at each hook point. errors: what storing cost."""

    states: Mapping[HookPoint, Sequence[tuple[int, int]]]
    errors: Mapping[Shard, StoredError]


@dataclass(frozen=True, kw_only=True)
class States:
    """States of one hook point, as ``ShardWriter.write`` takes them: values [n, H], divisor fp32 [n] or None."""

    point: HookPoint
    runs: Sequence[RowRun]
    values: torch.Tensor
    divisor: torch.Tensor | None = None


class StepFiles:
    """One rank's part in the steps of the store at ``path``; every rank that writes has one.

    Args:
        producers: of the ``GrowingStore``. nonfinite: ``refuse`` or ``keep`` infinite values and NaN.

    Raises:
        StoreError: another job works on the store.
    """

    def __init__(self, path: Path, producers: Sequence[Mapping[str, Any]], *, nonfinite: str = "refuse") -> None:
        self._path, self._staged, self._nonfinite = path, path / JOURNAL / STAGED, nonfinite
        self._unsynced: dict[Path, None] = {}
        with ExitStack() as stack, naming_store(path, JOURNAL):
            stack.enter_context(rank_lock(path, producers))
            self._resources = stack.pop_all()

    def write(self, begun: StepTarget, pieces: Iterable[States]) -> Share:
        """Puts states of a step, counted from 0 in it, to their places. They are there for every rank that reads, and
        durable after ``sync``.

        Raises:
            StoreError: a value is not finite, or too large for the stored dtype; or no space is left.
            ValueError: as ``writer.check_values``.
        """
        states: dict[HookPoint, list[tuple[int, int]]] = {}
        errors: dict[Shard, StoredError] = {}
        files = ShardFiles(self._staged, begun.target, _MAX_OPEN_FILES)
        try:
            for each in pieces:
                for written in files.write(self._batch(begun.target, each)):
                    states.setdefault(each.point, []).append((written.first_state, written.states))
                    self._unsynced[self._place(begun, written.shard)] = None
                    if written.error is not None:
                        add_error(errors, written.shard, written.error)
        finally:
            files.close()
        return Share(states=states, errors=errors)

    def seal(
        self, begun: StepTarget, shards: Iterable[Shard], errors: Mapping[Shard, StoredError]
    ) -> dict[Shard, ShardEntry]:
        """Finishes some shards of a step, by their numbers in it, once every rank has written; they have their final
        names then.

        Args:
            errors: what storing cost, over all ranks.
        """
        sealed = {}
        for shard in shards:
            entry = measure(self._staged, begun.target, shard, errors.get(shard), durable=False)
            place = self._place(begun, shard)
            with naming_store(self._path, str(shard[0])):
                os.rename(partial_path(self._staged, shard), place)
            self._unsynced[place] = None
            sealed[shard] = replace(
                entry,
                file=str(place.relative_to(self._path)),
                first_row=begun.first_state + entry.first_row,
            )
        return sealed

    def sync(self) -> None:
        """Returns when everything that this rank has written or sealed is durable, under its name; called when the last
        step is sealed on every rank."""
        folders = {place.parent: place.parent.name for place in self._unsynced}
        with naming_store(self._path, ", ".join(folders.values())):
            sync_files(self._unsynced)
            for folder in folders:
                sync_folder(folder)
        self._unsynced.clear()

    def close(self) -> None:
        """Lets go of the store."""
        self._resources.close()

    def _batch(self, target: Manifest, states: States) -> Batch:
        check_values(target, states.point, states.runs, states.values, states.divisor)
        encoded = encode(
            states.values,
            target.dtype,
            nonfinite=self._nonfinite,
            row_at=partial(state_name, target, states.point, states.runs),
        )
        divisor = None if states.divisor is None else states.divisor.contiguous()
        return Batch(point=states.point, pieces=tuple(_pieces(states.runs)), encoded=encoded, divisor=divisor)

    def _place(self, begun: StepTarget, shard: Shard) -> Path:
        """Where a shard of a step will lie."""
        return self._path / str(shard[0]) / shard_name(begun.first_shard + shard[1])


def check_shares(target: Manifest, shares: Sequence[Share]) -> dict[Shard, StoredError]:
    """Whether ranks have together written every state of a step once; what storing cost, of each of its shards.

    Raises:
        CoverageError: they have not.
    """
    for point in target.points:
        written = [states for share in shares for states in share.states.get(point, ())]
        whole, total = RowSet(written), sum(count for _, count in written)
        if len(whole) != target.states or total != target.states:
            rule = f"{target.states - len(whole)} of {point} are missing, {total - len(whole)} were written twice"
            raise CoverageError(f"not every state of a captured step was written exactly once: {rule}")
    errors: dict[Shard, StoredError] = {}
    for share in shares:
        for shard, error in share.errors.items():
            add_error(errors, shard, error)
    return errors


def _pieces(runs: Iterable[RowRun]) -> Iterator[Piece]:
    """Those that continue each other joined: fewer and larger writes."""
    index, last = 0, None
    for run in runs:
        if last is not None and last.first_state + last.length == run.first_row:
            last = replace(last, length=last.length + run.length)
        else:
            if last is not None:
                yield last
            last = Piece(first_state=run.first_row, length=run.length, index=index)
        index += run.length
    if last is not None:
        yield last
