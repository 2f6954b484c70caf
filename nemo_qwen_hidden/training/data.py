"""Text as blocks of tokens, and blocks of tokens as NeMo's trainer takes them.

S: tokens of a sequence.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches, update_num_microbatches
from nemo.collections.llm.gpt.data.utils import _reconfigure_limit_batches
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nemo_qwen_hidden.data.fingerprint import DataFingerprint
from nemo_qwen_hidden.data.sources import read_documents
from nemo_qwen_hidden.data.tokenize import TokenizedDocument, require_tokens, tokenize
from nemo_qwen_hidden.data.tokenizer import Tokenizer, load_tokenizer
from nemo_qwen_hidden.errors import ConfigError, DataError, UserError, raise_all
from nemo_qwen_hidden.training.job import DATA, DATA_RECORD, FinetuningJob

Sample = dict[str, Tensor]
END_OF_TEXT = "<|endoftext|>"


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
    """NeMo's data module of blocks of tokens: its ``MegatronDataSampler`` gives each data-parallel rank its samples,
    and a resumed run goes on with the sample after the last.

    Args:
        train, validation: [blocks, S + 1] each; without blocks for validation there is none. A subclass may set both
            in its ``setup``.
        samples: to train with, which is steps times ``global_batch_size``.
        seed: of the order of training blocks; None leaves them in order.
    """

    def __init__(
        self,
        train: Tensor | None = None,
        validation: Tensor | None = None,
        *,
        seq_length: int,
        samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.seq_length, self.micro_batch_size, self.global_batch_size = seq_length, micro_batch_size, global_batch_size
        self._train, self._validation, self._samples, self._seed = train, validation, samples, seed
        self._first_step = 0
        self.data_sampler = MegatronDataSampler(
            seq_len=self.seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Of the samples that were not consumed yet."""
        assert self.trainer is not None and self._train is not None
        self._first_step = self.data_sampler.init_global_step = self.trainer.global_step
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


class TextData(BlockData):
    """The data of a fine-tuning run: documents laid end to end, each ended by the tokenizer's ``<|endoftext|>`` where
    it has one, and cut into blocks; the last documents are for validation.

    One process of a machine tokenizes, into ``data/`` of the run's folder, where all map the blocks.
    """

    def __init__(self, job: FinetuningJob) -> None:
        train = job.settings.train
        super().__init__(
            seq_length=train.seq_length,
            samples=train.max_steps * train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
            seed=train.seed,
        )
        self._job, self._folder = job, job.run_path / DATA

    def prepare_data(self) -> None:
        """Called by Lightning on the first rank of each machine.

        Raises:
            DataError: too little of it, or others than those that the run was begun with.
        """
        job, train = self._job, self._job.settings.train
        documents, fingerprint, end = _read(job)
        require_tokens(sum(map(len, documents)), job.data_path)
        held_out = ceil(train.validation_part * len(documents))
        if held_out == len(documents):
            rule = "must hold a document more than are kept for validation (`train.validation_part`)"
            raise DataError("data.path", rule, f"{len(documents)} in {job.data_path}")
        cut = len(documents) - held_out
        blocks = {"train": _blocks(documents[:cut], end, self.seq_length)}
        blocks["validation"] = _blocks(documents[cut:], end, self.seq_length)
        least = {"train": 1, "validation": self.global_batch_size if held_out else 0}
        for name, count in least.items():
            if len(blocks[name]) < count:
                rule = f"must hold text for at least {count} sequences of `train.seq_length` to {_PURPOSE[name]}"
                raise DataError("data.path", rule, f"text for {len(blocks[name])}")
        self._record({"sha256": fingerprint, "seq_length": self.seq_length, "validation_documents": held_out})
        for name, array in blocks.items():
            np.save(self._folder / f"{name}.npy", array)

    def setup(self, stage: str) -> None:
        """Called by Lightning on every rank."""
        arrays = {name: np.load(self._folder / f"{name}.npy", mmap_mode="c") for name in ("train", "validation")}
        self._train, self._validation = (torch.from_numpy(arrays[name]) for name in ("train", "validation"))

    def _record(self, origin: dict[str, Any]) -> None:
        file, train = self._folder / DATA_RECORD, self._job.settings.train
        schedule = {name: getattr(train, name) for name in SCHEDULE}
        if self._job.begun and file.is_file():
            before = json.loads(file.read_text())
            known = before.pop("schedule")
            if before != origin:
                rule = f"must be what the run at {self._job.run_path} was begun with, as must be how it is cut"
                raise DataError("data.path", f"{rule} ({before})", origin)
            where = f"as the run at {self._job.run_path} was begun"
            least = known.pop("max_steps")
            problems: list[UserError] = [
                ConfigError(f"train.{name}", f"must be {value}, {where}", schedule[name])
                for name, value in known.items()
                if schedule[name] != value
            ]
            if train.max_steps < least:
                rule = f"must be at least {least}, {where}"
                problems.insert(0, ConfigError("train.max_steps", rule, train.max_steps))
            raise_all(problems)
        self._folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**origin, "schedule": schedule}) + "\n")


SCHEDULE = ("max_steps", "lr", "min_lr", "warmup_steps", "seed")
"""Settings that a run goes on with as it was begun, but that it may become longer: a checkpoint has the learning rates,
and the order of samples follows from the seed."""
_PURPOSE = {"train": "train with", "validation": "validate with (or none: `train.validation_part` 0)"}


def _read(job: FinetuningJob) -> tuple[list[NDArray[np.int32]], str, int | None]:
    """Token ids of each document, the data's fingerprint, and the token that ends a text."""
    used: list[Tokenizer] = []

    def tokenizer() -> Tokenizer:
        used.append(load_tokenizer(job.tokenizer_folder))
        return used[0]

    read = read_documents(job.data_path, **job.fields)
    fingerprint = DataFingerprint()
    tokenized: Iterable[TokenizedDocument] = tokenize(read, tokenizer, vocab_size=job.architecture.shape.vocab_size)
    documents = []
    for document in tokenized:
        fingerprint.update(document)
        documents.append(document.token_ids)
    return documents, fingerprint.hexdigest(), used[0].special_tokens.get(END_OF_TEXT) if used else None


def _blocks(documents: Sequence[NDArray[np.int32]], end: int | None, seq_length: int) -> NDArray[np.int32]:
    """[blocks, S + 1], of which each begins with the token that the one before ends with."""
    parts = [part for document in documents for part in (document, np.array([] if end is None else [end], np.int32))]
    tokens = np.concatenate([np.empty(0, np.int32), *parts])
    count = max(0, (len(tokens) - 1) // seq_length)
    windows = (
        np.lib.stride_tricks.sliding_window_view(tokens, seq_length + 1) if count else np.empty((0, seq_length + 1))
    )
    return np.ascontiguousarray(windows[: count * seq_length : seq_length], np.int32)
