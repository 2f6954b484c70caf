"""NeMo's Trainer on a machine without a GPU: the same run in every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import Tiny, save_tiny
from tests.support.training import LAYOUTS, VOCAB, Job, Outcome, batch_blocks, train, whole_weights

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("training") / "model", Tiny(layers=4, groups=2, tied=True), vocab_size=VOCAB
    )


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    from nemo_qwen_hidden.parallel.launch import run_ranks

    log = tmp_path_factory.mktemp("alone") / "ranks.log"
    ((outcome,),) = run_ranks(train, (folder, [Job(steps=STEPS)]), world=1, log=log)
    return outcome


def test_first_loss_and_gradient_are_those_of_transformers(folder: Path, alone: Outcome) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blocks = batch_blocks(STEPS * 4)[:4]
    logits = model(blocks[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert alone.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    assert alone.norms[0] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_trains_the_same(world: int, folder: Path, alone: Outcome, start_ranks: Start) -> None:
    jobs = [Job(steps=STEPS, topology=topology) for topology in LAYOUTS[world]]
    ranks = start_ranks(world, train, folder, jobs)
    expected = whole_weights([alone])
    for number, job in enumerate(jobs):
        outcomes = [outcomes[number] for outcomes in ranks]
        assert outcomes[0].losses == pytest.approx(alone.losses, rel=1e-5), job.topology
        assert outcomes[0].norms == pytest.approx(alone.norms, rel=1e-5), job.topology
        weights = whole_weights(outcomes)
        assert sorted(weights) == sorted(expected), job.topology
        for name, whole in weights.items():
            assert np.abs(whole - expected[name]).max() < 1e-4, (job.topology, name)


RECOMPUTE: dict[str, dict[str, object]] = {
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "uniform 1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform 2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block 2": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
}


def test_what_is_recomputed_has_the_same_bits(folder: Path, alone: Outcome, start_ranks: Start) -> None:
    """Also with our own model class, whose layers have an arithmetic of their own where nothing is trained."""
    jobs = [Job(steps=STEPS, model=model, own_model=True) for model in ({}, *RECOMPUTE.values())]
    ((plain, *recomputed),) = start_ranks(1, train, folder, jobs)
    assert plain.losses == alone.losses and plain.norms == alone.norms
    for name, outcome in zip(RECOMPUTE, recomputed, strict=True):
        assert outcome.losses == plain.losses, name
        assert outcome.norms == plain.norms, name
        weights, expected = whole_weights([outcome]), whole_weights([plain])
        assert all(np.array_equal(weights[each], expected[each]) for each in expected), name


def test_bf16_and_the_distributed_optimizer_train_without_a_gpu(
    folder: Path, alone: Outcome, start_ranks: Start
) -> None:
    jobs = [
        Job(steps=STEPS, topology=Topology(dp=2), distributed_optimizer=True),
        Job(steps=STEPS, topology=Topology(dp=2), dtype="bf16"),
        Job(steps=STEPS, topology=Topology(dp=2), dtype="bf16", distributed_optimizer=True),
    ]
    ranks = start_ranks(2, train, folder, jobs)
    exact, half, half_distributed = ranks[0]
    assert exact.losses == pytest.approx(alone.losses, rel=1e-5)
    assert exact.norms == pytest.approx(alone.norms, rel=1e-5)
    assert half.losses == pytest.approx(alone.losses, rel=1e-2)
    assert half_distributed.losses == pytest.approx(half.losses, rel=1e-5)


def first_pass(rank: Rank, folder: Path) -> tuple[bool, bool]:
    """Whether a layer in training mode has the same bits with and without gradients; whether it has in evaluation."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.host import megatron_on_host

    torch.set_num_threads(1)
    model = Qwen2HiddenModel.from_pretrained(folder)
    ids = batch_blocks(4)[:, :-1]
    positions, same = torch.arange(ids.shape[1]).expand_as(ids), []
    for training in (True, False):
        model.train(training)
        with megatron_on_host():
            with_gradients = model(ids, positions)
            with torch.no_grad():
                same.append(torch.equal(model(ids, positions), with_gradients))
    return same[0], same[1]


def test_in_training_mode_a_pass_without_gradients_has_the_same_bits(folder: Path, start_ranks: Start) -> None:
    ((training, evaluation),) = start_ranks(1, first_pass, folder)
    assert training
    assert not evaluation  # else nothing has been shown: the two ways of computing agree
