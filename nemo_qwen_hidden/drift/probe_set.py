"""The captured steps of a probe set in a store: the same tokens in each, so that states can be compared one by one.

Legend: K states of one step, n of a block, H numbers in each.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.read.reader import Store, StoredDocument
from nemo_qwen_hidden.store.read.steps import StepView
from nemo_qwen_hidden.store.read.tokens import PartTokens

PHASE = "probe"
BLOCK_NUMBERS = 1 << 21
"""Of one step that are looked at together, about: 16 MB in float64."""


class ProbeSet:
    """The probe set of a store.

    Attributes:
        steps: that were captured, ascending.

    Raises:
        StoreError: the store holds no captured step of a probe set.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.steps = tuple(sorted(entry.step for entry in store.steps if entry.phase == PHASE))
        if not self.steps:
            rule = "must hold captured steps of a probe set, as ProbeSetCallback writes them while a model is trained"
            raise StoreError("store", rule, self.path)
        self._alike: set[tuple[int, int]] = set()

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
        return self._at(step).states

    def documents(self, step: int) -> int:
        """The number of documents of ``step``."""
        return self._at(step).documents

    def tokens(self, step: int) -> PartTokens:
        """The token table of ``step``, whose rows and documents are counted from 0."""
        return self._at(step).tokens

    def rows_of_states(self, step: int) -> NDArray[np.int64]:
        """[K], the row of each state in the token table of ``step``."""
        return self.tokens(step).kept_rows(0, self.tokens(step).rows)

    def document_ids(self, step: int) -> list[str]:
        """The id of each document as the data gave it."""
        tokens, prefix = self.tokens(step), f"{PHASE}/{step}/"
        return [tokens.document_info(number).id.removeprefix(prefix) for number in range(tokens.documents)]

    def check_alike(self, step: int, reference: int) -> None:
        """Whether two steps hold states of the same tokens.

        Raises:
            StoreError: one of them was not captured, or they do not.
        """
        if step == reference or (step, reference) in self._alike:
            self._at(step)
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
        """[n, H] of some states of ``step``, ascending, counted from 0 in it."""
        consecutive = len(states) and int(states[-1]) - int(states[0]) == len(states) - 1
        chosen = slice(int(states[0]), int(states[-1]) + 1) if consecutive else states
        values: NDArray[np.float32] = self._at(step)[hook_point].float().numpy(chosen)
        return values

    def blocks(self, hook_point: str, states: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """``states`` in order, cut into as many as are looked at together."""
        size = max(1, BLOCK_NUMBERS // self.width(hook_point))
        return (states[start : start + size] for start in range(0, len(states), size))

    def _at(self, step: int) -> StepView[StoredDocument]:
        """UnknownStepError where it was not captured."""
        return self._store.at(step=step, phase=PHASE)
