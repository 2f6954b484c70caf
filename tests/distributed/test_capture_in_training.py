"""``HiddenStatesCallback`` in NeMo's Trainer: it changes nothing, and every state comes once and is right."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.capturing import (
    Captured,
    Capturing,
    State,
    capture_in_training,
    expected_states,
    transformers_model,
)
from tests.support.models import Tiny, save_tiny
from tests.support.training import SEQ_LENGTH, VOCAB, Job, Outcome, batch_blocks, whole_weights

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
FULL = {"recompute_granularity": "full"}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full, each layer": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 1},
    "full, two layers": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 2},
    "full, block": {**FULL, "recompute_method": "block", "recompute_num_layers": 1},
}
LAYERS = 8  # two for each virtual stage
# on every stage; in every part of a layer that is recomputed
POINTS = ("embed", "resid_post@0", "mlp_act@0", "attn_out@1", "mlp_out@2", "resid_post@3", "z@5", "resid_post@7")
POINTS += ("final_norm",)
PRECISE = 5e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = Tiny(layers=LAYERS, groups=2, tied=True)
    return save_tiny(tmp_path_factory.mktemp("training") / "model", tiny, vocab_size=VOCAB)


@pytest.mark.parametrize("world", LAYOUTS)
def test_a_run_is_the_same_bit_by_bit(world: int, folder: Path, start_ranks: Start) -> None:
    """Losses, gradients, weights and random states after each of 20 steps, with dropout."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    jobs = [Job(steps=20, topology=topology, model=dropout) for topology in LAYOUTS[world]]
    settings = {"hook_points": POINTS, "every": 3, "steps": (1,)}
    runs = [Capturing(job=job, settings=each) for job in jobs for each in (None, settings)]
    for found in start_ranks(world, capture_in_training, folder, runs):
        for without, captured in zip(found[::2], found[1::2], strict=True):
            assert not without.states and {state.step for state, _ in captured.states} == {0, 1, 3, 6, 9, 12, 15, 18}
            assert len(captured.fingerprints) == 20
            assert captured.fingerprints == without.fingerprints
            assert captured.losses == without.losses


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_state_comes_once_and_is_that_of_a_plain_forward(world: int, folder: Path, start_ranks: Start) -> None:
    """Four microbatches a step, and a validation after each."""
    settings = {"hook_points": POINTS, "phases": ("train", "validation")}
    jobs = [
        Job(
            steps=2,
            micro_batch_size=2,
            global_batch_size=8 * topology.dp,
            validation=8 * topology.dp,
            topology=topology,
            model=recompute,
            trainer={"val_check_interval": 1},
        )
        for topology in LAYOUTS[world]
        for recompute in RECOMPUTE.values()
    ]
    runs = [Capturing(job=job, settings=settings, weights=True) for job in jobs]
    ranks = start_ranks(world, capture_in_training, folder, runs)
    for number, job in enumerate(jobs):
        check(folder, job, [rank[number] for rank in ranks])


def check(folder: Path, job: Job, ranks: list[Captured]) -> None:
    """All ranks together have every state of every sample exactly once, and each is right."""
    states = [each for rank in ranks for each in rank.states]
    found = dict(states)
    assert len(found) == len(states), "a state came twice"
    models = {step: transformers_model(folder, _weights(ranks, step)) for step in ranks[0].weights}
    expected = 0
    for phase, step, sample, tokens in samples_of(job):
        assert all(rank.samples.get((phase, step, sample), tokens) == tokens for rank in ranks)
        microbatch = sample % job.global_batch_size // (job.micro_batch_size * job.topology.dp)
        for (point, position), state in expected_states(models[step], tokens, POINTS).items():
            mine = found[State(phase, step, microbatch, sample, point, position)]
            error = np.linalg.norm(mine - state) / np.linalg.norm(state)
            assert error < PRECISE, (job.topology, job.model, phase, step, sample, point, position)
            expected += 1
    assert len(found) == expected == 4 * job.global_batch_size * SEQ_LENGTH * len(POINTS)


def samples_of(job: Job) -> Iterator[tuple[str, int, int, list[int]]]:
    """Phase, step, number and token ids of every sample, by Megatron's way of giving them out."""
    for number, block in enumerate(batch_blocks(job.steps * job.global_batch_size)):
        yield "train", number // job.global_batch_size, number, block[:-1].tolist()
    for number, block in enumerate(batch_blocks(job.validation, seed=12)):
        for step in range(job.steps):
            yield "validation", step + 1, number, block[:-1].tolist()


def _weights(ranks: list[Captured], step: int) -> dict[str, np.ndarray]:
    return whole_weights([Outcome(pieces=rank.weights[step]) for rank in ranks])
