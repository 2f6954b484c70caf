"""Samples with more to them than tokens, such as labels, as NeMo's trainer takes them.

B: sequences, S: tokens of a sequence.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from nemo_qwen_hidden.training.data import BlockData, Blocks, Sample


class Columns(Blocks):
    """Samples out of columns: ``tokens`` [samples, S], and whatever else there is, [samples, ...] each. In an order as
    that of ``Blocks``."""

    def __init__(self, columns: Mapping[str, Tensor], *, count: int, seed: int | None) -> None:
        super().__init__(columns["tokens"], count=count, seed=seed)
        self._columns = columns

    def __getitem__(self, number: int) -> Sample:
        """One entry of each column."""
        epoch, place = divmod(number, len(self._columns["tokens"]))
        index = self._orders(epoch)[place]
        return {name: column[index] for name, column in self._columns.items()}


class ColumnData(BlockData):
    """``BlockData`` whose samples have the columns that a model and its losses on states want.

    Args:
        train, validation: as ``Columns`` takes them. With ``tokens`` and ``lengths`` int64 [samples] alone,
            ``padded_columns`` makes the others that Megatron wants.
    """

    def __init__(
        self, train: Mapping[str, Tensor], validation: Mapping[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        super().__init__(train["tokens"], seq_length=train["tokens"].shape[1], **arguments)
        self._train_columns, self._validation_columns = dict(train), dict(validation or {})

    def train_dataloader(self) -> DataLoader[Sample]:
        """Of the samples that were not consumed yet."""
        super().train_dataloader()  # remembers the first step
        return self._loader("train", Columns(self._train_columns, count=self._samples, seed=self._seed))

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """The same samples each time."""
        if not self._validation_columns:
            return []
        count = len(self._validation_columns["tokens"])
        return self._loader("validation", Columns(self._validation_columns, count=count, seed=None))


def padded_columns(tokens_BS: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """What Megatron and the losses on states want of texts that are padded on the right: beside the tokens ``labels``
    (the next token) and ``position_ids``, int64 [B, S], ``loss_mask``, fp32 [B, S], which counts tokens with a next
    one, and ``last``, int64 [B], the position of the last token."""
    positions = torch.arange(tokens_BS.shape[1])
    return {
        "tokens": tokens_BS,
        "labels": F.pad(tokens_BS[:, 1:], (0, 1)),
        "position_ids": positions.expand_as(tokens_BS),
        "loss_mask": (positions < lengths[:, None] - 1).float(),
        "last": lengths - 1,
    }
