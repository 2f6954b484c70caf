"""A batch of ragged sequences as the pipeline takes it: checked, and cut into microbatches.

Every rank is given the whole batch. A row is the token's number among all tokens of the batch, sequence after sequence,
padding not counted.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from nemo_qwen_hidden.capture.edits import BoundEdit, Edit
from nemo_qwen_hidden.capture.gather import BatchAssembler
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.microbatches import Batching, Microbatch, plan
from nemo_qwen_hidden.topology import Topology


class Batch:
    """Token ids [batch, tokens] or states [batch, tokens, H], padded on the right.

    Args:
        lengths: tokens of each sequence; None where none is padded.
        batch_tokens, packing: how the batch is cut into microbatches.

    Raises:
        ConfigError: a shape, a length or a token id that cannot be.
    """

    def __init__(
        self,
        inputs: Tensor,
        lengths: Sequence[int] | Tensor | None,
        topology: Topology,
        *,
        batch_tokens: int,
        packing: bool,
    ) -> None:
        self._inputs = inputs
        self.tokens = inputs.shape[1]
        self.lengths = _lengths(inputs, lengths)
        batching = Batching(
            max_tokens=self.tokens,
            batch_tokens=batch_tokens,
            packing=packing,
            multiple_of=topology.sequence_multiple,
            segment_multiple=topology.segment_multiple,
        )
        self.microbatches: list[Microbatch] = list(plan(self.lengths, batching))
        self.assembler = BatchAssembler(self.lengths, self.tokens)

    def rows(self, first_row: int, length: int) -> Tensor:
        """Of consecutive rows of one sequence, token ids [length] or states [length, H]."""
        return self._flat[first_row : first_row + length]

    def bound(self, edits: Sequence[Edit], hidden_size: int) -> tuple[BoundEdit, ...]:
        """Edits of this batch.

        Raises:
            ConfigError: a mask over another batch.
        """
        for edit in edits:
            mask = edit.mask
            if mask is not None and (len(mask) != len(self.lengths) or mask.shape[1] > self.tokens):
                rule = f"must be of shape [batch, tokens], {[len(self.lengths), self.tokens]}, or of fewer tokens"
                raise ConfigError(f"mask of the edit at {edit.hook_point}", rule, list(mask.shape))
            for parameter in edit.parameters:
                if parameter.shape[-1:] != (hidden_size,):
                    rule = f"must have the model's hidden size {hidden_size} as their last axis"
                    raise ConfigError(f"tensors of the edit at {edit.hook_point}", rule, list(parameter.shape))
        return tuple(BoundEdit(edit=edit, place_of=self.assembler.place_of) for edit in edits)

    def last_tokens(self) -> Tensor:
        """The mask of each sequence's last token, bool [batch, tokens]."""
        return torch.arange(self.tokens) == torch.tensor(self.lengths)[:, None] - 1

    @cached_property
    def _flat(self) -> Tensor:
        return torch.cat([self._inputs[index, :length].cpu() for index, length in enumerate(self.lengths)])


class BatchRows:
    """Values [batch, tokens, H] as rows of a batch: what a gradient is seeded with."""

    def __init__(self, values: Tensor, lengths: Sequence[int]) -> None:
        self._flat = torch.cat([values[index, :length].cpu() for index, length in enumerate(lengths)])

    def __call__(self, first_row: int, length: int) -> Tensor:
        return self._flat[first_row : first_row + length]


def seeds_of(gradients: Mapping[HookPoint, Tensor], batch: Batch) -> dict[HookPoint, BatchRows]:
    """Upstream gradients [batch, tokens, H], by hook point, as rows of ``batch``."""
    return {point: BatchRows(values, batch.lengths) for point, values in gradients.items()}


def check_token_ids(input_ids: Tensor, lengths: Sequence[int], vocab_size: int) -> None:
    """Whether the tokens, padding not counted, are of the vocabulary.

    Raises:
        ConfigError: one is not, or these are no token ids.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ConfigError("input_ids", "must be integers of shape [batch, tokens]", list(input_ids.shape))
    for index, length in enumerate(lengths):
        used = input_ids[index, :length]
        if int(used.min()) < 0 or int(used.max()) >= vocab_size:
            raise ConfigError(
                "input_ids", f"must hold token ids from 0 to {vocab_size - 1} (sequence {index})", int(used.max())
            )


def _lengths(inputs: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
    """Tokens of each sequence, checked against the batch."""
    ragged = [inputs.shape[1]] * inputs.shape[0] if lengths is None else [int(length) for length in lengths]
    if len(ragged) != inputs.shape[0] or not all(1 <= length <= inputs.shape[1] for length in ragged):
        rule = f"must be {inputs.shape[0]} integers from 1 to {inputs.shape[1]}"
        raise ConfigError("lengths", rule, ragged)
    return ragged
