"""The captured steps of a store, and one of them read as if it were a store of its own.

Legend: K states of a step, n states asked for, H numbers in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.rows import Rows, resolve
from nemo_qwen_hidden.store.read.tokens import PartTokens, TokenTable
from nemo_qwen_hidden.store.statistics import Statistics

if TYPE_CHECKING:
    import torch

    from nemo_qwen_hidden.store.read.stored import StoredStates
    from nemo_qwen_hidden.store.read.views import HookPointView

Document = TypeVar("Document", covariant=True)


class UnknownStepError(StoreError, KeyError):
    """The store does not hold this step."""

    __str__ = Exception.__str__  # KeyError's would put the message in quotes


@dataclass(frozen=True, kw_only=True)
class StepEntry:
    """One captured step of a store. phase: ``train``, ``validation`` or ``probe``. step: optimizer steps that the
    weights had been given, from 0. samples: (first, count) of consecutive sample numbers, in the order of documents.
    part: of the store. rows, states, documents: of the store, those of this part."""

    phase: str
    step: int
    samples: tuple[tuple[int, int], ...]
    part: int
    rows: range
    states: range
    documents: range


class WholeStore(Protocol[Document]):
    """What a view of a step needs of its store, ``reader.Store``, which says more of each."""

    path: Path | str
    manifest: Manifest
    tokens: TokenTable

    @property
    def hook_points(self) -> tuple[str, ...]: ...

    @property
    def dtype(self) -> "torch.dtype": ...

    @property
    def final_norm(self) -> "tuple[torch.Tensor, float]": ...

    def __getitem__(self, hook_point: str | HookPoint) -> "HookPointView": ...

    def __contains__(self, hook_point: object) -> bool: ...

    def document(self, index: int) -> Document: ...

    def stored(self, states: Rows, views: "Sequence[HookPointView]") -> "list[StoredStates]": ...

    def divisor(self, hook_point: str | HookPoint, states: Rows) -> "torch.Tensor": ...

    def statistics(self, hook_point: str | HookPoint, shards: range | None = None) -> Statistics: ...


class StepView(Generic[Document]):
    """One captured step: everything counts from 0 in it. Made by ``Store.at``; reads nothing by itself.

    ``view["resid_post@3"]`` gives the states at a hook point, [K, H], as that of a store does, ``view.tokens`` the
    token table, ``view.document(0)`` the first sample.
    """

    def __init__(self, store: WholeStore[Document], entry: StepEntry) -> None:
        self._store, self.entry = store, entry
        self.path: Path | str = store.path

    @property
    def rows(self) -> int:
        """The number of tokens."""
        return len(self.entry.rows)

    @property
    def documents(self) -> int:
        """The number of samples."""
        return len(self.entry.documents)

    @property
    def states(self) -> int:
        """K."""
        return len(self.entry.states)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """As of the store."""
        return self._store.hook_points

    @property
    def dtype(self) -> "torch.dtype":
        """As of the store."""
        return self._store.dtype

    @property
    def final_norm(self) -> "tuple[torch.Tensor, float]":
        """As of the store."""
        return self._store.final_norm

    @property
    def tokens(self) -> PartTokens:
        """The token table of the step."""
        return self._store.tokens.part(self.entry.part)

    @cached_property
    def manifest(self) -> Manifest:
        """Of a store of this step alone, but that shards have the numbers, and states, of the whole."""
        whole = self._store.manifest
        shards = whole.grid.of_part(self.entry.part)
        part = replace(whole.parts[self.entry.part], first_row=0, first_document=0)
        entries = (replace(entry, shards=entry.shards[shards.start : shards.stop]) for entry in whole.hook_points)
        return replace(whole, parts=(part,), hook_points=tuple(entries))

    def __getitem__(self, hook_point: str | HookPoint) -> "HookPointView":
        """The states at one hook point, [K, H], not read yet; UnknownHookPointError where the store lacks it."""
        from nemo_qwen_hidden.store.read.views import HookPointView  # needs torch

        return HookPointView(self, self.manifest.entry(self._store[hook_point].hook_point))

    def __contains__(self, hook_point: object) -> bool:
        return hook_point in self._store

    def document(self, index: int) -> Document:
        """Sample number ``index`` of the step, as a document of the store; IndexError where there is none."""
        return self._store.document(self.entry.documents[index])

    def read_views(self, states: Rows, views: "Sequence[HookPointView]") -> "list[torch.Tensor]":
        """The same states of several views of this step, each [n, H], or [H] for an int."""
        chosen = resolve(states, self.states, "state")
        many = range(chosen, chosen + 1) if isinstance(chosen, int) else chosen
        found = self._store.stored(self._shifted(many), views)
        values = [view.finish(stored.decoded(), many) for view, stored in zip(views, found, strict=True)]
        return [value[0] for value in values] if isinstance(chosen, int) else values

    def divisor(self, hook_point: str | HookPoint, states: Rows) -> "torch.Tensor":
        """As of the store."""
        return self._store.divisor(hook_point, self._shifted(resolve(states, self.states, "state")))

    def statistics(self, hook_point: str | HookPoint) -> Statistics:
        """Of the stored values of this step at one hook point."""
        return self._store.statistics(hook_point, self._store.manifest.grid.of_part(self.entry.part))

    def _shifted(self, states: Rows) -> Rows:
        """As the whole store numbers them."""
        first = self.entry.states.start
        if isinstance(states, int):
            return states + first
        if isinstance(states, range):
            return range(states.start + first, states.stop + first, states.step)
        return np.asarray(states, np.int64) + first

    def __repr__(self) -> str:
        step, rows = f"{self.entry.phase} step {self.entry.step}", f"{self.rows} rows of {self.documents} samples"
        return f"StepView({step} of {str(self.path)!r}: {len(self.hook_points)} hook points x {rows})"
