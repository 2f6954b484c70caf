"""Interventions: what a residual site passes on is replaced, for chosen tokens, wherever a rank has them.

    from nemo_qwen_hidden.capture import edits

    steered = edits.add("resid_post@12", vector)
    model.logits(input_ids, edits=[steered])

An edit changes token by token, so that it is the same however the tokens lie on the ranks. H: hidden size, n: tokens
that a rank has of the chosen ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_qwen_hidden.capture.rows import View
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import RESIDUAL_SITES, HookPoint


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which tokens these are: the index of each one's sequence in the batch and its position there, int64 [n]."""

    sequence: Tensor
    position: Tensor


Change = Callable[[Tensor, Where], Tensor]
"""States [n, H] to those that take their place. Has to treat each token by itself: a rank has only some of them."""


class PlaceOfRow(Protocol):
    """From a row of a batch to its sequence and its position there."""

    def __call__(self, row: int) -> tuple[int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Edit:
    """hook_point: at a residual site. mask: bool [batch, tokens], the tokens that are changed; None: all, those
    that are generated later included. parameters: tensors of ``change`` whose gradients are wanted, the same on all
    ranks."""

    hook_point: HookPoint
    change: Change
    mask: Tensor | None = None
    parameters: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.hook_point.site not in RESIDUAL_SITES:
            rule = f"must be at one of the residual sites {', '.join(RESIDUAL_SITES)}"
            raise ConfigError("hook point of an edit", rule, str(self.hook_point))
        if self.mask is not None and (self.mask.ndim != 2 or self.mask.dtype != torch.bool):
            rule = "must be bool of shape [batch, tokens]"
            raise ConfigError("mask of an edit", rule, f"{self.mask.dtype} {list(self.mask.shape)}")


def add(hook_point: str, vector: Tensor, *, factor: float = 1.0, mask: Tensor | None = None) -> Edit:
    """Adds ``factor`` times ``vector`` [H]: steering."""
    return _edit(hook_point, lambda rows, _: rows + factor * vector.to(rows), mask, vector)


def zero(hook_point: str, *, mask: Tensor | None = None) -> Edit:
    """Sets to zero: zero ablation."""
    return _edit(hook_point, lambda rows, _: torch.zeros_like(rows), mask)


def mean(hook_point: str, vector: Tensor, *, mask: Tensor | None = None) -> Edit:
    """Sets to ``vector`` [H], such as the mean of a store's states: mean ablation."""
    return _edit(hook_point, lambda rows, _: vector.to(rows).expand_as(rows), mask, vector)


def scale(hook_point: str, factor: float, *, mask: Tensor | None = None) -> Edit:
    """Multiplies by ``factor``."""
    return _edit(hook_point, lambda rows, _: rows * factor, mask)


def project_out(hook_point: str, direction: Tensor, *, mask: Tensor | None = None) -> Edit:
    """Takes away the part along ``direction`` [H]: h - (h . d) d with d the direction at length 1 (directional
    ablation, https://arxiv.org/abs/2406.11717)."""

    def change(rows: Tensor, _: Where) -> Tensor:
        unit = direction.to(rows) / direction.to(rows).norm()
        changed: Tensor = rows - (rows @ unit)[:, None] * unit
        return changed

    return _edit(hook_point, change, mask, direction)


def patch(hook_point: str, states: Tensor, *, mask: Tensor | None = None) -> Edit:
    """Sets to the states of another run, [batch, tokens, H]: activation patching. Without a mask all tokens that there
    are states for.

    Raises:
        ConfigError: the mask has tokens that there are no states for.
    """
    if states.ndim == 3 and mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
    if states.ndim != 3 or mask is None or len(mask) != len(states) or mask.shape[1] > states.shape[1]:
        rule = "must be of shape [batch, tokens, hidden], with all tokens of the mask"
        raise ConfigError("states of a patch", rule, list(states.shape))
    return _edit(hook_point, lambda rows, where: states[where.sequence, where.position].to(rows), mask, states)


def patch_rows(hook_point: str, stored: Any, rows: Tensor) -> Edit:
    """Sets to states of a store.

    Args:
        stored: a hook point of an open store, or whatever gives states [n, H] for an array of row numbers.
        rows: int64 [batch, tokens], the row that each token gets the state of; -1 leaves the token as it is.
    """

    def change(states: Tensor, where: Where) -> Tensor:
        wanted = rows[where.sequence, where.position].numpy()
        return torch.as_tensor(stored[wanted]).to(states)

    return _edit(hook_point, change, rows >= 0)


def apply(hook_point: str, change: Change, *, mask: Tensor | None = None, parameters: Sequence[Tensor] = ()) -> Edit:
    """Any function of the states, token by token; ``parameters`` are tensors in it whose gradients may be asked for."""
    return _edit(hook_point, change, mask, *parameters)


def _edit(hook_point: str, change: Change, mask: Tensor | None, *parameters: Tensor) -> Edit:
    return Edit(hook_point=HookPoint.parse(hook_point), change=change, mask=mask, parameters=parameters)


@dataclass(frozen=True, kw_only=True)
class BoundEdit:
    """An edit of one batch."""

    edit: Edit
    place_of: PlaceOfRow

    def __call__(self, state_CBH: Tensor, view: View) -> Tensor | None:
        """The state with the chosen tokens replaced; None where this rank has none of them."""
        index, sequences, where = self._tokens(view)
        if not len(index):
            return None
        index, sequences = index.to(state_CBH.device), sequences.to(state_CBH.device)
        rows = state_CBH[index, sequences]
        changed = self.edit.change(rows, where)
        given = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        if given != list(rows.shape):
            rule = f"must give states of the shape that it got, {list(rows.shape)}"
            raise ConfigError(f"edit at {self.edit.hook_point}", rule, given)
        return state_CBH.index_put((index, sequences), changed.to(rows.dtype))

    def _tokens(self, view: View) -> tuple[Tensor, Tensor, Where]:
        """Of the chosen tokens that this rank has: indices and sequences in its tensors, and where they belong."""
        found: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64)] for _ in range(4)]
        for run in view.residual_runs:
            sequence, position = self.place_of(run.first_row)
            steps = torch.arange(run.length)
            if self.edit.mask is not None:
                chosen = self.edit.mask[sequence, position : position + run.length]
                steps = steps[: len(chosen)][chosen.cpu()]
            columns = (
                run.index - view.first_index + steps,
                torch.full_like(steps, run.sequence),
                torch.full_like(steps, sequence),
                position + steps,
            )
            for column, part in zip(found, columns, strict=True):
                column.append(part)
        index, sequences, sequence_of, positions = (torch.cat(column) for column in found)
        return index, sequences, Where(sequence=sequence_of, position=positions)
