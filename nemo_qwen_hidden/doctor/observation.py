"""What is looked at: the states of a few passages at some hook points, and what they claim to be.

R: rows, the tokens of all passages, passage after passage. W: width of a state, H at the residual sites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from nemo_qwen_hidden.errors import DataError
from nemo_qwen_hidden.hookpoint import HookPoint

States = Mapping[HookPoint, Tensor]
"""fp32 [R, W] of each hook point."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Consecutive tokens of a document that see each other, from position 0: a document, or a window of a long one.

    document: its number. first_token: the place of its first token in the document. token_ids: int64 [tokens].
    """

    document: int
    token_ids: Tensor
    first_token: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """states: what was found. compute: dtype that the model ran in, stored: dtype that the values went through
    afterwards, both as in the settings (``fp32``). kept: bool [R], the rows that are there; None stands for all.

    Raises:
        DataError: no tokens, or states of another number of rows.
    """

    passages: tuple[Passage, ...]
    states: States
    compute: str
    stored: str
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError("documents", "must hold at least one token", self.rows)
        for point, values in self.states.items():
            if values.ndim != 2 or len(values) != self.rows:
                rule = f"must have a row for each of the {self.rows} tokens"
                raise DataError(f"states at {point}", rule, list(values.shape))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each passage, then R."""
        return tuple(accumulate((len(passage) for passage in self.passages), initial=0))

    @property
    def rows(self) -> int:
        """R."""
        return self.starts[-1]

    @cached_property
    def present(self) -> Tensor:
        """bool [R]: rows that are there."""
        return torch.ones(self.rows, dtype=torch.bool) if self.kept is None else self.kept

    def place(self, row: int) -> tuple[int, int]:
        """Document and token, both from 0, of a row."""
        index = max(number for number, start in enumerate(self.starts[:-1]) if start <= row)
        passage = self.passages[index]
        return passage.document, passage.first_token + row - self.starts[index]

    def only(self, passages: Sequence[int], points: Sequence[HookPoint]) -> "Observation":
        """Some passages at some hook points."""
        rows = torch.cat([torch.arange(self.starts[index], self.starts[index + 1]) for index in passages])
        return replace(
            self,
            passages=tuple(self.passages[index] for index in passages),
            states={point: self.states[point][rows] for point in points},
            kept=None if self.kept is None else self.kept[rows],
        )
