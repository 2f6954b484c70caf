"""What batches of NeMo's data sets say of their samples, and which samples they are by NeMo's samplers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.training.watch.batches import Batch, Numbering, whole_length
from tests.conftest import Start

END = 2
TEXTS = (("5 2 7", "8 2 2"), ("4 4", "2"), ("1 2 3 4", "9"))
SIZE, MICROBATCHES = 3, 2


class Tokenizer:
    """Words as numbers. As with Qwen, samples hold the token that they are padded with."""

    eos_id = bos_id = pad_id = END
    tokenizer = SimpleNamespace(apply_chat_template=None)  # NeMo looks whether there is one

    def text_to_ids(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def nemo_batches(rank: Rank) -> dict[str, Any]:
    """A batch of each of NeMo's data sets for fine-tuning, over ``TEXTS``."""
    from nemo.collections.llm.gpt.data.core import GPTSFTChatDataset, GPTSFTDataset, GPTSFTPackedDataset

    def made(kind: Any, **more: Any) -> Any:
        class InMemory(kind):  # type: ignore[misc]
            def _load_dataset(self) -> None:
                self.indexed_dataset = []

            def _build_samples_mapping(self) -> None:
                self.samples_mapping = None

        settings = {"prompt_template": "{input} {output}", "label_key": "output", "truncation_field": "input"}
        return InMemory("", Tokenizer(), max_seq_length=32, pad_seq_length_to_mult=8, **settings, **more)

    single = made(GPTSFTDataset)
    samples = [single._process_example({"input": text, "output": answer}) for text, answer in TEXTS]
    ids = [sample["input_ids"] for sample in samples]
    packs = [
        {
            "input_ids": np.array([token for each in pack for token in each]),
            "seq_boundaries": np.cumsum([0, *map(len, pack)]).tolist(),
            "loss_mask": np.ones(sum(map(len, pack))),
        }
        for pack in (ids[:2], ids[2:])
    ]
    turns = [
        {"input_ids": torch.tensor(each), "context_ids": torch.tensor(each[:1]), "answer_ids": torch.tensor(each[1:])}
        | {"loss_mask": torch.ones(len(each)), "metadata": {}}
        for each in ids
    ]
    return {
        "ids": ids,
        "padded": plain(single.collate_fn(samples)),
        "packed": plain(made(GPTSFTPackedDataset).collate_fn(packs)),
        "chat": plain(made(GPTSFTChatDataset).collate_fn(turns)),
    }


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    """What a process may hand on and then end."""
    return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from nemo_qwen_hidden.parallel.launch import run_ranks

    (found,) = run_ranks(nemo_batches, world=1, log=tmp_path_factory.mktemp("batches") / "ranks.log")
    for name in ("padded", "packed", "chat"):
        found[name]["tokens"] = torch.from_numpy(found[name]["tokens"])
    return found


def test_padded_samples_have_the_tokens_that_are_read(batches: dict[str, Any]) -> None:
    batch = Batch.of((batches["padded"], 0, 0), None, cp=1)
    for row, length, ids in zip(batch.token_ids, batch.lengths, batches["ids"], strict=True):
        assert row[:length].tolist() == ids[:-1]
        assert length < batch.token_ids.shape[1] and set(row[length:].tolist()) == {END}


def test_a_pack_is_one_sample_without_the_padding_at_its_end(batches: dict[str, Any]) -> None:
    batch = Batch.of(batches["packed"], None, cp=1)
    first, second, third = (ids[:-1] for ids in batches["ids"])
    packs = [row[:length].tolist() for row, length in zip(batch.token_ids, batch.lengths, strict=True)]
    assert packs == [first + second, third]
    assert max(batch.lengths) < batch.token_ids.shape[1]


def test_packs_are_refused_under_context_parallelism(batches: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="packed"):
        Batch.of(batches["packed"], None, cp=2)


def test_chats_do_not_say_how_long_they_are_so_somebody_has_to(batches: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        Batch.of(batches["chat"], None, cp=1)
    whole = Batch.of(batches["chat"], whole_length, cp=1)
    assert set(whole.lengths) == {whole.token_ids.shape[1]}
    told = Batch.of(batches["chat"], lambda batch: [len(ids) - 1 for ids in batches["ids"]], cp=1)
    assert [row[:n].tolist() for row, n in zip(told.token_ids, told.lengths, strict=True)] == [
        ids[:-1] for ids in batches["ids"]
    ]


def test_a_batch_may_say_its_lengths_or_have_no_padding() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    assert Batch.of({"tokens": tokens, "lengths": torch.tensor([4, 1, 2])}, None, cp=1).lengths == (4, 1, 2)
    plain = Batch.of({"tokens": tokens, "loss_mask": torch.zeros(3, 4)}, None, cp=1)
    assert plain.lengths == (4, 4, 4)
    assert [part.token_ids.tolist() for part in plain.split(3)] == tokens[:, None].tolist()


@pytest.mark.parametrize(
    ("batch", "rule"),
    [
        (torch.zeros(2, 3), "tokens"),
        ({"input_ids": torch.zeros(2, 3)}, "tokens"),
        ({"tokens": torch.zeros(2, 3), "lengths": [3]}, "2 whole numbers"),
        ({"tokens": torch.zeros(2, 3), "lengths": [0, 3]}, "from 1 to 3"),
        ({"tokens": torch.zeros(2, 3), "lengths": [1, 4]}, "from 1 to 3"),
    ],
)
def test_what_cannot_be_is_refused(batch: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Batch.of(batch, None, cp=1)


def nemo_numbers(rank: Rank, kind: str, replicas: int) -> list[Any]:
    """What NeMo's samplers give each replica of the third and the fourth step."""
    from nemo.collections.common.data.data_samplers import MegatronPretrainingBatchSampler
    from nemo.lightning.data import MegatronPretrainingSampler

    whole = SIZE * MICROBATCHES * replicas
    sampler = MegatronPretrainingSampler if kind == "single" else MegatronPretrainingBatchSampler
    return [
        list(
            sampler(
                total_samples=4 * whole,
                consumed_samples=2 * whole,
                micro_batch_size=SIZE,
                global_batch_size=whole,
                data_parallel_rank=replica,
                data_parallel_size=replicas,
                drop_last=True,
            )
        )
        for replica in range(replicas)
    ]


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_numbers_are_those_of_nemos_samplers(kind: str, start_ranks: Start) -> None:
    replicas = 3
    whole = SIZE * MICROBATCHES * replicas
    (given,) = start_ranks(1, nemo_numbers, kind, replicas)
    steps = [
        Numbering(
            consumed=step * whole,
            micro_batch_size=SIZE,
            microbatches=MICROBATCHES,
            replicas=replicas,
            strided=kind == "batch",
        )
        for step in (2, 3)
    ]
    assert {step.samples for step in steps} == {whole}
    for replica, batches_of_replica in enumerate(given):
        mine = [list(step.numbers(number, replica)) for step in steps for number in range(MICROBATCHES)]
        if kind == "batch":  # a whole step at a time
            mine = [mine[0] + mine[1], mine[2] + mine[3]]
        assert mine == batches_of_replica
