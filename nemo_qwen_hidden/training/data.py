"""Text as blocks of tokens, and blocks of tokens as NeMo's trainer takes them.

S: tokens of a sequence.
"""

import json
from collections.abc import Mapping, Sequence
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

from nemo_qwen_hidden.checkpoint.fingerprint import weights_sha256
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.data.fingerprint import DataFingerprint
from nemo_qwen_hidden.errors import ConfigError, DataError, UserError, raise_all
from nemo_qwen_hidden.plan.training import held_out, sequences_of
from nemo_qwen_hidden.store.files import write_durably
from nemo_qwen_hidden.training.job import DATA, DATA_RECORD, FinetuningJob
from nemo_qwen_hidden.training.texts import Counts, Texts, check

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
        """Of the samples that were not consumed yet. A run that has come to its end asks too, and takes none; NeMo's
        samplers refuse to be without (NeMo 2.7.3, ``lightning/data.py:341``)."""
        assert self.trainer is not None and self._train is not None
        self._first_step = self.data_sampler.init_global_step = self.trainer.global_step
        count = max(self._samples, self.data_sampler.init_consumed_samples + self.global_batch_size)
        return self._loader("train", Blocks(self._train, count=count, seed=self._seed))

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
            ConfigError, ConfigErrors: a schedule that the run was not begun with; another model below its LoRA.
        """
        job, train = self._job, self._job.settings.train
        documents, fingerprint, end = _read(job)
        out = held_out(len(documents), train.validation_part)
        kept = len(documents) - out
        blocks = {"train": _blocks(documents[:kept], end, self.seq_length)}
        blocks["validation"] = _blocks(documents[kept:], end, self.seq_length)
        sizes = {name: len(array) for name, array in blocks.items()}
        tokens = sum(map(len, documents))
        check(job, Counts(documents=len(documents), held_out=out, tokens=tokens, exact=True, **sizes))
        self._record({"sha256": fingerprint, "seq_length": self.seq_length, "validation_documents": out})
        for name, array in blocks.items():
            written = self._folder / f".{name}.npy"
            np.save(written, array)
            written.replace(self._folder / f"{name}.npy")

    def setup(self, stage: str) -> None:
        """Called by Lightning on every rank."""
        arrays = {name: np.load(self._folder / f"{name}.npy", mmap_mode="c") for name in ("train", "validation")}
        self._train, self._validation = (torch.from_numpy(arrays[name]) for name in ("train", "validation"))

    def _record(self, origin: dict[str, Any]) -> None:
        file, train = self._folder / DATA_RECORD, self._job.settings.train
        schedule = {name: getattr(train, name) for name in SCHEDULE}
        # a checkpoint of a LoRA has not the weights below it
        base = None if train.lora_dim is None else _weights_sha256(self._job)
        if self._job.begun and file.is_file():
            before = json.loads(file.read_text())
            known, known_base = before.pop("schedule"), before.pop("base", None)
            if before != origin:
                rule = f"must be what the run at {self._job.run_path} was begun with, as must be how it is cut"
                raise DataError("data.path", f"{rule} ({before})", origin)
            where = f"as the run at {self._job.run_path} was begun"
            least = known["max_steps"]
            problems: list[UserError] = [
                ConfigError(f"train.{name}", f"must be {known.get(name)}, {where}", value)
                for name, value in schedule.items()
                if name != "max_steps" and known.get(name) != value
            ]
            if train.max_steps < least:
                rule = f"must be at least {least}, {where}"
                problems.insert(0, ConfigError("train.max_steps", rule, train.max_steps))
            raise_all(problems)
            if base != known_base:
                rule = f"must be the model whose weights have the sha256 {known_base}, {where}"
                raise ConfigError("model.path", rule, base)
        self._folder.mkdir(parents=True, exist_ok=True)
        said = {**origin, "schedule": schedule} | ({} if base is None else {"base": base})
        write_durably(file, f"{json.dumps(said)}\n".encode())


def _weights_sha256(job: FinetuningJob) -> str:
    """Of the weights that a run begins with, all of which are read."""
    return weights_sha256(open_weights(job.model_folder, job.architecture))


SCHEDULE = ("max_steps", "lr", "min_lr", "warmup_steps", "lora_dim", "seed")
"""Settings that a run goes on with as it was begun, but that it may become longer: a checkpoint has the learning rates
and what is trained, and the order of samples follows from the seed."""


def _read(job: FinetuningJob) -> tuple[list[NDArray[np.int32]], str, int | None]:
    """Token ids of each document, the data's fingerprint, and the token that ends a text."""
    texts, fingerprint, documents = Texts(job), DataFingerprint(), []
    for document in texts:
        fingerprint.update(document)
        documents.append(document.token_ids)
    return documents, fingerprint.hexdigest(), texts.end


def _blocks(documents: Sequence[NDArray[np.int32]], end: int | None, seq_length: int) -> NDArray[np.int32]:
    """[blocks, S + 1], of which each begins with the token that the one before ends with."""
    parts = [part for document in documents for part in (document, np.array([] if end is None else [end], np.int32))]
    tokens = np.concatenate([np.empty(0, np.int32), *parts])
    count = sequences_of(len(tokens), seq_length)
    windows = (
        np.lib.stride_tricks.sliding_window_view(tokens, seq_length + 1) if count else np.empty((0, seq_length + 1))
    )
    return np.ascontiguousarray(windows[: count * seq_length : seq_length], np.int32)
