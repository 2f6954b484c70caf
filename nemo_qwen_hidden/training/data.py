"""Blocks of tokens as NeMo's trainer takes them.

B: sequences, S: tokens of a sequence.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches, update_num_microbatches
from nemo.collections.llm.gpt.data.utils import _reconfigure_limit_batches
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Sample = dict[str, Tensor]


class Blocks(Dataset[Sample]):
    """Samples number 0 to ``count - 1`` out of blocks of tokens [blocks, S + 1], of which all but the last are read and
    all but the first predicted.

    Every pass over the blocks has an order of its own, drawn from ``seed`` and the number of the pass; None leaves
    them in order. What a sample is depends on nothing else: not on the layout, nor on where a run was resumed.
    """

    def __init__(self, blocks: Tensor, *, count: int, seed: int | None) -> None:
        self._blocks, self._count, self._seed = blocks, count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Sample:
        """tokens, labels, position_ids int64 [S]; loss_mask fp32 [S]."""
        epoch, place = divmod(number, len(self._blocks))
        block = self._blocks[self._orders(epoch)[place]].long()
        return {
            "tokens": block[:-1],
            "labels": block[1:],
            "loss_mask": torch.ones(len(block) - 1),
            "position_ids": torch.arange(len(block) - 1),
        }

    def _orders(self, epoch: int) -> Tensor:
        if self._seed is None:
            return torch.arange(len(self._blocks))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 2**20 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._blocks), generator=generator)
        return self._order


class BlockData(pl.LightningDataModule):
    """NeMo's data module of blocks of tokens: its ``MegatronDataSampler`` gives each data-parallel rank its samples, and
    a resumed run goes on with the sample after the last.

    Args:
        train, validation: [blocks, S + 1] each; without blocks for validation there is none.
        samples: to train with, which is steps times ``global_batch_size``.
        seed: of the order of training blocks; None leaves them in order.
    """

    def __init__(
        self,
        train: Tensor,
        validation: Tensor | None = None,
        *,
        samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.micro_batch_size, self.global_batch_size, self.seq_length = micro_batch_size, global_batch_size, 0
        self._train, self._validation, self._samples, self._seed = train, validation, samples, seed
        self.seq_length = train.shape[1] - 1
        self._first_step = 0
        self.data_sampler = MegatronDataSampler(
            seq_len=self.seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Of the samples that were not consumed yet."""
        self._first_step = self.data_sampler.init_global_step = self.trainer.global_step  # type: ignore[union-attr]
        return self._loader("train", Blocks(self._train, count=self._samples, seed=self._seed))

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """The same samples each time."""
        if self._validation is None or not len(self._validation):
            return []
        return self._loader("validation", Blocks(self._validation, count=len(self._validation), seed=None))

    def _loader(self, mode: str, blocks: Blocks) -> DataLoader[Sample]:
        loader: DataLoader[Sample] = WrappedDataLoader(mode, dataset=blocks, num_workers=0)
        return loader

    def reconfigure_limit_batches(self) -> None:
        """Called by NeMo's strategy: Lightning counts microbatches where a user counts batches."""
        trainer = self.trainer
        assert trainer is not None
        trainer.limit_val_batches = _reconfigure_limit_batches(trainer.limit_val_batches, self.val_dataloader())
        trainer.num_sanity_val_steps *= get_num_microbatches()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: how many samples were consumed."""
        assert self.trainer is not None
        steps = self.trainer.global_step - self._first_step
        return {"consumed_samples": self.data_sampler.compute_consumed_samples(steps)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on after the consumed samples of a checkpoint."""
        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)
