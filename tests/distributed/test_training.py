"""NeMo's Trainer on a machine without a GPU: the same run in every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import Tiny, save_tiny
from tests.support.training import VOCAB, Job, Outcome, batch_blocks, train, whole_weights

STEPS = 3
LAYOUTS = {
    2: (
        Topology(tp=2),
        Topology(tp=2, sp=True),
        Topology(pp=2),
        Topology(pp=2, vp=2),
        Topology(cp=2),
        Topology(dp=2),
    ),
    4: (Topology(tp=2, pp=2),),
}


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
