"""Reads a store: opens without touching a shard, opens shards when states in them are asked for, copies only those.

Needs neither NeMo nor Megatron, and torch only once states are read. Legend: N rows of the store, K of them with a
state, n states asked for, H numbers in each.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.captured import captured_steps
from nemo_qwen_hidden.store.entries import FileEntry
from nemo_qwen_hidden.store.fields import load_json
from nemo_qwen_hidden.store.folder import describe_marker
from nemo_qwen_hidden.store.format import MANIFEST, MARKER
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.norm_file import EPSILON, WEIGHT
from nemo_qwen_hidden.store.read.rows import Rows, Several, resolve
from nemo_qwen_hidden.store.read.source import Folder, Source
from nemo_qwen_hidden.store.read.steps import StepEntry, StepView, UnknownStepError
from nemo_qwen_hidden.store.read.tokens import TokenTable
from nemo_qwen_hidden.store.shard import DIVISOR
from nemo_qwen_hidden.store.statistics import Statistics, merge

if TYPE_CHECKING:
    import torch

    from nemo_qwen_hidden.store.read.stored import ShardReader, StoredStates
    from nemo_qwen_hidden.store.read.views import HookPointView

_MOST_BYTES = 1 << 62  # offsets stay within int64


class UnknownHookPointError(StoreError, KeyError):
    """The store does not hold this hook point."""

    __str__ = Exception.__str__  # KeyError's would put the message in quotes


def open_store(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> "Store":
    """The store at ``path``. Reads the manifest alone; no other file is opened.

    Args:
        path: a folder, or a URL of any file system that fsspec knows (``s3://bucket/store``; needs the extra
            ``remote``, and fsspec's package for that file system).
        storage_options: of that file system, as fsspec takes them.

    Raises:
        StoreNotFoundError: there is none, or one whose first job has not finished.
        StoreError: the manifest is not what it should be; names file and field.
    """
    if isinstance(path, str) and ("://" in path or "::" in path):
        from nemo_qwen_hidden.store.read.remote import RemoteShards, open_url  # fsspec is imported for this alone

        source = open_url(path, storage_options or {})
        if not isinstance(source, Folder):
            manifest = _manifest(source)
            return Store(path, source, manifest, partial(RemoteShards, source, manifest), options=storage_options)
        path = source.path
    elif storage_options:
        raise StoreError("storage_options", "must be given with a URL alone", sorted(storage_options))
    folder = Folder(Path(path))
    manifest = _manifest(folder)
    return Store(folder.path, folder, manifest, partial(_mapped_shards, folder.path, manifest))


class Store:
    """A finished store; made by ``open_store``. Can be pickled, to be opened again where it is unpickled.

    Attributes:
        path: its folder, or its URL. manifest: what it is. tokens: what each row is.
    """

    def __init__(
        self,
        path: Path | str,
        source: Source,
        manifest: Manifest,
        open_shards: "Callable[[], ShardReader]",
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.manifest, self.tokens = path, manifest, TokenTable(source, manifest.parts)
        self._source, self._open_shards, self._options = source, open_shards, options
        self._numbers = {str(point): number for number, point in enumerate(manifest.points)}
        self._statistics: dict[tuple[int, range], Statistics] = {}

    @property
    def hook_points(self) -> tuple[str, ...]:
        """What is stored, as ``resid_post@12``, in order of depth."""
        return tuple(self._numbers)

    @property
    def rows(self) -> int:
        """N, the number of tokens."""
        return self.tokens.rows

    @property
    def documents(self) -> int:
        """The number of documents."""
        return self.tokens.documents

    @property
    def states(self) -> int:
        """K, the number of tokens whose states are stored: N, unless the store keeps some rows alone."""
        return self.tokens.states

    @property
    def hidden_size(self) -> int:
        """Of the model: the size of the residual stream."""
        return self.manifest.hidden_size

    @property
    def dtype(self) -> "torch.dtype":
        """What states are read as: the stored dtype, or float32 where that is int8."""
        from nemo_qwen_hidden.store.tensors import read_dtype

        return read_dtype(self.manifest.dtype)

    def __getitem__(self, hook_point: str | HookPoint) -> "HookPointView":
        """The states at one hook point, [K, H], not read yet; UnknownHookPointError where the store lacks it."""
        from nemo_qwen_hidden.store.read.views import HookPointView

        return HookPointView(self, self.manifest.hook_points[self._number(hook_point)])

    def __contains__(self, hook_point: object) -> bool:
        return str(hook_point) in self._numbers

    @overload
    def row_of_states(self, states: int) -> int: ...
    @overload
    def row_of_states(self, states: Several) -> NDArray[np.int64]: ...
    def row_of_states(self, states: Rows) -> int | NDArray[np.int64]:
        """The rows of some states: int64 [n], or an int for one. In a full store these numbers themselves."""
        return self.tokens.row_of_states(states)

    @overload
    def state_of_rows(self, rows: int) -> int: ...
    @overload
    def state_of_rows(self, rows: Several) -> NDArray[np.int64]: ...
    def state_of_rows(self, rows: Rows) -> int | NDArray[np.int64]:
        """The states of some rows: int64 [n], or an int for one. In a full store these numbers themselves.

        Raises:
            RowNotKeptError: the store does not keep the state of one of them.
        """
        return self.tokens.state_of_rows(rows)

    def read(
        self, states: Rows, hook_points: "Iterable[str | HookPoint | HookPointView] | None" = None
    ) -> "dict[str, torch.Tensor]":
        """The same states at several hook points, at all of them by default: [n, H] of each by name, [H] for an int.

        Args:
            states: everything that a view takes. hook_points: names, or views of this store, whose values are given.

        Raises:
            UnknownHookPointError: the store lacks one. ValueError: a hook point is given twice, or is another store's.
            What indexing a view raises.
        """
        views = self.views(hook_points)
        return dict(zip(views, self.read_views(states, list(views.values())), strict=True))

    def views(
        self, hook_points: "Iterable[str | HookPoint | HookPointView] | None" = None
    ) -> "dict[str, HookPointView]":
        """Views by the name of their hook point, of all by default; raises as ``read`` does."""
        from nemo_qwen_hidden.store.read.views import HookPointView

        asked = self.hook_points if hook_points is None else hook_points
        views = [point if isinstance(point, HookPointView) else self[point] for point in asked]
        named = {str(view.hook_point): view for view in views}
        if len(named) != len(views):
            raise ValueError(f"each hook point can be read once: {[str(view.hook_point) for view in views]}")
        if any(view.store is not self for view in views):
            raise ValueError(f"a view of another store cannot be read from {self.path}")
        return named

    def read_views(self, states: Rows, views: "Sequence[HookPointView]") -> "list[torch.Tensor]":
        """The same states of several views, each [n, H], or [H] for an int."""
        chosen = self._chosen(states)
        found = self.stored(chosen, views)
        values = [view.finish(stored.decoded(), chosen) for view, stored in zip(views, found, strict=True)]
        return [value[0] for value in values] if isinstance(chosen, int) else values

    def stored(self, states: Rows, views: "Sequence[HookPointView]") -> "list[StoredStates]":
        """The same states at the hook points of several views, as they lie in shards: each [n, H], n = 1 for an int."""
        chosen = self._chosen(states)
        numbers = [self._numbers[str(view.hook_point)] for view in views]
        if isinstance(chosen, int):
            return self._shards.consecutive(numbers, chosen, 1)
        if isinstance(chosen, range) and chosen.step == 1:
            return self._shards.consecutive(numbers, chosen.start, len(chosen))
        return self._shards.scattered(numbers, np.asarray(chosen, np.int64))

    def divisor(self, hook_point: str | HookPoint, states: Rows) -> "torch.Tensor":
        """fp32 [n], or a scalar for an int: what the final norm divided each of these states by: sqrt(mean(x**2) + eps)
        of the state x before it.

        Raises:
            StoreError: the hook point was stored without it; or a shard is not what the manifest says.
        """
        import torch

        from nemo_qwen_hidden.store.read.stored import check_shard

        number = self._number(hook_point)
        entry = self.manifest.hook_points[number]
        if not entry.divisor:
            raise StoreError(f"{entry.point}: divisor", "must have been stored beside the states", entry.meaning)
        chosen = self._chosen(states)
        places = np.atleast_1d(np.asarray(chosen, np.int64))
        shards = np.searchsorted(np.asarray(self.manifest.grid.starts), places, side="right") - 1
        found = np.empty(len(places), np.float32)
        for shard in np.unique(shards).tolist():
            listed = entry.present[shard]
            header, tensors = self._source.tensors(listed.file)
            check_shard(self.manifest, number, shard, header, self._source.name(listed.file))
            here = shards == shard
            found[here] = tensors[DIVISOR][places[here] - listed.first_row]
        return torch.from_numpy(found)[0] if isinstance(chosen, int) else torch.from_numpy(found)

    @cached_property
    def steps(self) -> tuple[StepEntry, ...]:
        """The captured steps of a training run, in the order in which they were captured; of a store that an extraction
        has made there are none.

        Raises:
            StoreError: what the manifest says of one is not what it should be.
        """
        parts, first_states = self.manifest.parts, self.manifest.first_states
        return tuple(
            StepEntry(
                phase=step.phase,
                step=step.step,
                samples=step.samples,
                part=number,
                rows=range(parts[number].first_row, parts[number].first_row + parts[number].rows),
                states=range(first_states[number], first_states[number + 1]),
                documents=range(parts[number].first_document, parts[number].first_document + parts[number].documents),
            )
            for number, step in captured_steps(parts, str(self.path))
        )

    @cached_property
    def _steps(self) -> dict[tuple[str, int], StepEntry]:
        return {(entry.phase, entry.step): entry for entry in self.steps}

    def at(self, *, step: int, phase: str | None = None) -> "StepView[StoredDocument]":
        """One captured step, to be read as if it were a store of its own. phase: may be left out where the store has
        steps of one phase alone.

        Raises:
            UnknownStepError: the store does not hold it; or it has several phases and none is given.
        """
        phases = sorted({entry.phase for entry in self.steps})
        if phase is None and len(phases) > 1:
            raise UnknownStepError("phase", f"must be one that {self.path} holds ({', '.join(phases)})", None)
        entry = self._steps.get((phases[0] if phase is None and phases else phase or "", step))
        if entry is None:
            held = [known.step for known in self.steps if phase in (None, known.phase)]
            among = f"{len(held)}, {held[0]} to {held[-1]}" if held else "none"
            rule = f"must be a captured step{'' if phase is None else f' of phase {phase!r}'} that {self.path} holds"
            raise UnknownStepError("step", f"{rule} ({among})", step)
        return StepView(self, entry)

    def document(self, index: int) -> "StoredDocument":
        """Document number ``index``; IndexError where there is none."""
        info = self.tokens.document_info(index)
        rows, states = self.tokens.document_rows(index), self.tokens.document_states(index)
        return StoredDocument(index=index, id=info.id, source=info.source, rows=rows, states=states, store=self)

    def statistics(self, hook_point: str | HookPoint, shards: range | None = None) -> Statistics:
        """Of the stored values of one hook point, or of some of its shards, whose states it numbers from the first of
        them; the first call reads arrays beside the values of every shard.

        Raises:
            UnknownHookPointError: the store lacks it. StoreError: a shard is not what the manifest says.
        """
        number = self._number(hook_point)
        asked = range(self.manifest.grid.shards) if shards is None else shards
        if (number, asked) not in self._statistics:
            listed = self.manifest.hook_points[number].present[asked.start : asked.stop]
            known = zip(listed, self._shards.sums(number, asked), strict=True)
            first = listed[0].first_row if listed else 0
            each = ((shard.first_row - first, shard.rows, shard.statistics, sums) for shard, sums in known)
            self._statistics[number, asked] = merge(each, self.manifest.hook_points[number].width)
        return self._statistics[number, asked]

    @cached_property
    def final_norm(self) -> "tuple[torch.Tensor, float]":
        """Weight, fp32 [H], and epsilon of the model's final RMSNorm.

        Raises:
            StoreError: the store has none, or its file is not what it should be.
        """
        entry = self.manifest.final_norm
        if entry is None:
            raise StoreError("final_norm", "must be known to the store", str(self.path))
        return self._final_norm(entry)

    def _final_norm(self, entry: FileEntry) -> "tuple[torch.Tensor, float]":
        import torch

        file = self._source.name(entry.file)
        header, tensors = self._source.tensors(entry.file)
        layout = {name: (spec.dtype, spec.shape) for name, spec in header.tensors.items()}
        expected = {WEIGHT: ("F32", (self.hidden_size,))}
        if layout != expected or header.size_bytes != entry.bytes:
            rule = f"must be {entry.bytes} bytes that hold {expected}, as the manifest says"
            raise StoreError(file, rule, (header.size_bytes, layout))
        text = header.metadata.get(EPSILON, "")
        try:
            eps = float(text)
        except ValueError:
            eps = -1.0
        if not 0 <= eps < 1:
            raise StoreError(f"{file}: {EPSILON}", "must be a number from 0 to 1", text)
        return torch.from_numpy(np.array(tensors[WEIGHT])), eps

    @cached_property
    def _shards(self) -> "ShardReader":
        return self._open_shards()

    def _chosen(self, states: Rows) -> int | range | NDArray[np.int64]:
        return resolve(states, self.states, "row" if self.tokens.full else "state")

    def _number(self, hook_point: str | HookPoint) -> int:
        number = self._numbers.get(str(hook_point))
        if number is None:
            names = self.hook_points
            shown = ", ".join(names if len(names) <= 8 else (*names[:4], "...", *names[-3:]))
            raise UnknownHookPointError("hook point", f"must be one that {self.path} holds ({shown})", str(hook_point))
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        path = self.path.absolute() if isinstance(self.path, Path) else self.path
        return open_store, (path, self._options)

    def __repr__(self) -> str:
        points = f"{len(self._numbers)} hook points" if len(self._numbers) != 1 else self.hook_points[0]
        kept = "" if self.tokens.full else f"{self.states} of "
        size = f"{kept}{self.rows} rows x {self._sizes}, {self.manifest.stored_dtype}, {self.documents} documents"
        return f"Store({str(self.path)!r}: {points} x {size})"

    @property
    def _sizes(self) -> str:
        """Of a state, at the hook points."""
        sizes = {" x ".join(map(str, entry.shape)) for entry in self.manifest.hook_points}
        return sizes.pop() if len(sizes) == 1 else "several sizes"


@dataclass(frozen=True, kw_only=True)
class StoredDocument:
    """One document of a store. rows: its rows. states: those of its kept rows, which in a full store are its rows.
    ``document["resid_post@3"]`` gives them, [kept tokens, H]."""

    index: int
    id: str
    source: str
    rows: range
    states: range
    store: Store

    @property
    def position(self) -> NDArray[np.int64]:
        """[kept tokens], the place in the document of each token that has a state."""
        return self.store.row_of_states(self.states) - self.rows.start

    @property
    def token_id(self) -> NDArray[np.int32]:
        """[tokens], of all of its tokens."""
        found: NDArray[np.int32] = self.store.tokens.token_id[self.rows.start : self.rows.stop]
        return found

    def __len__(self) -> int:
        """The number of its tokens."""
        return len(self.rows)

    def __getitem__(self, hook_point: str | HookPoint) -> "torch.Tensor":
        """[kept tokens, H]; UnknownHookPointError where the store lacks the hook point."""
        return self.store[hook_point][self.states]

    def __repr__(self) -> str:
        rows = f"rows {self.rows.start} to {self.rows.stop - 1}" if self.rows else "no rows"
        rows += "" if self.store.tokens.full else f" ({len(self.states)} kept)"
        return f"StoredDocument({self.index}: {self.id!r}, {rows}, from {self.source!r})"


def _mapped_shards(folder: Path, manifest: Manifest) -> "ShardReader":
    from nemo_qwen_hidden.store.read.mapped import MappedShards

    return MappedShards(folder, manifest)


def _manifest(source: Source) -> Manifest:
    if not source.exists(MANIFEST):
        raise StoreNotFoundError("store", _missing(source), source.location)
    manifest = Manifest.from_json(source.read(MANIFEST), source.name(MANIFEST))
    size = manifest.states * max(entry.width for entry in manifest.hook_points) * manifest.dtype.bytes
    if size >= _MOST_BYTES:
        raise StoreError(source.name(MANIFEST), f"must claim less than {_MOST_BYTES} bytes a hook point", size)
    return manifest


def _missing(source: Source) -> str:
    """Why there is no store at ``source``, as the rule of an error."""
    if not source.exists(MARKER):
        return f"must be the folder of a store, with a {MANIFEST}"
    begun = describe_marker(load_json(source.read(MARKER), source.name(MARKER)))
    state = "is still being made, or was left unfinished, and goes on with the command that made it"
    return f"must be a finished store; this one {state} ({begun})"
