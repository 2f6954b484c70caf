"""The captured steps of a probe set in a store: the same tokens in each, so that states can be compared one by one.

Legend: K states of one step, n of a block, H numbers in each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.read.reader import Store
from nemo_qwen_hidden.store.read.tokens import PartTokens

PHASE = "probe"
BLOCK_NUMBERS = 1 << 21
"""Of one step that are looked at together, about: 16 MB in float64."""


@dataclass(frozen=True, kw_only=True)
class ProbeStep:
    """One captured step. part: of the store. states: of the store, those of this part."""

    step: int
    part: int
    states: range


class ProbeSet:
    """The probe set of a store.

    Attributes:
        steps: that were captured, ascending.

    Raises:
        StoreError: no part of the store is a captured step of a probe set, or two are of the same step.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._steps = _probe_steps(store)
        self._alike: set[tuple[int, int]] = set()
        self.steps = tuple(sorted(self._steps))

    @property
    def path(self) -> str:
        """Of the store."""
        return str(self._store.path)

    def hook_points(self, names: Iterable[str] | None = None) -> tuple[str, ...]:
        """Those of ``names``, in their order, or all of the store; UnknownHookPointError where the store lacks one."""
        return tuple(self._store.views(names))

    def width(self, hook_point: str) -> int:
        """H."""
        return self._store[hook_point].shape[1]

    def size(self, step: int) -> int:
        """K, the number of states of ``step`` at each hook point."""
        return len(self._step(step).states)

    def documents(self, step: int) -> int:
        """The number of documents of ``step``."""
        return self.tokens(step).documents

    def tokens(self, step: int) -> PartTokens:
        """The token table of ``step``, whose rows and documents are counted from 0."""
        return self._store.tokens.part(self._step(step).part)

    def rows_of_states(self, step: int) -> NDArray[np.int64]:
        """[K], the row of each state in the token table of ``step``."""
        return self.tokens(step).kept_rows(0, self.tokens(step).rows)

    def document_ids(self, step: int) -> list[str]:
        """The id of each document as the data gave it."""
        tokens, prefix = self.tokens(step), f"{PHASE}/{step}/"
        return [tokens.document_info(number).id.removeprefix(prefix) for number in range(tokens.documents)]

    def documents_path(self, step: int) -> str | None:
        """Where the documents of ``step`` came from, where the store says so."""
        path = self._store.manifest.parts[self._step(step).part].data.get("path")
        return path if isinstance(path, str) else None

    def check_alike(self, step: int, reference: int) -> None:
        """Whether two steps hold states of the same tokens.

        Raises:
            StoreError: one of them was not captured, or they do not.
        """
        if step == reference or (step, reference) in self._alike:
            self._step(step)
            return
        one, other = self.tokens(step), self.tokens(reference)
        for what, here, there in (
            ("documents", one.document_first_row, other.document_first_row),
            ("tokens", one.token_id, other.token_id),
            ("states", self.rows_of_states(step), self.rows_of_states(reference)),
        ):
            if not np.array_equal(np.asarray(here), np.asarray(there)):
                rule = f"must hold the same {what} at step {step} as at step {reference}, to be compared with it"
                raise StoreError("store", rule, self.path)
        self._alike.add((step, reference))

    def values(self, step: int, hook_point: str, states: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, H] of some states of ``step``, counted from 0 in it."""
        first = self._step(step).states.start
        consecutive = len(states) and int(states[-1]) - int(states[0]) == len(states) - 1
        chosen = range(first + int(states[0]), first + int(states[-1]) + 1) if consecutive else states + first
        values: NDArray[np.float32] = self._store[hook_point].float().numpy(chosen)
        return values

    def blocks(self, hook_point: str, states: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """``states`` in order, cut into as many as are looked at together."""
        size = max(1, BLOCK_NUMBERS // self.width(hook_point))
        return (states[start : start + size] for start in range(0, len(states), size))

    def _step(self, step: int) -> ProbeStep:
        if step not in self._steps:
            shown = ", ".join(
                map(str, self.steps if len(self.steps) <= 8 else (*self.steps[:6], "...", self.steps[-1]))
            )
            raise StoreError("step", f"must be one that {self.path} holds of its probe set ({shown})", step)
        return self._steps[step]


def _probe_steps(store: Store) -> dict[int, ProbeStep]:
    found: dict[int, ProbeStep] = {}
    starts = accumulate((part.states for part in store.manifest.parts), initial=0)
    for number, (part, (start, stop)) in enumerate(zip(store.manifest.parts, pairwise(starts), strict=True)):
        if part.data.get("phase") != PHASE:
            continue
        step = part.data.get("step")
        if type(step) is not int:
            raise StoreError(f"{store.path}: part {number}: step", "must be a whole number", step)
        if step in found:
            raise StoreError("store", f"must hold step {step} of its probe set once", str(store.path))
        found[step] = ProbeStep(step=step, part=number, states=range(start, stop))
    if not found:
        rule = "must hold captured steps of a probe set, as ProbeSetCallback writes them while a model is trained"
        raise StoreError("store", rule, str(store.path))
    return found
