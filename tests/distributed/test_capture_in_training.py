"""``HiddenStatesCallback`` in NeMo's Trainer: it changes nothing, and every state comes once and is right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_qwen_hidden.errors import RankError
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.capturing import (
    PACKED,
    Captured,
    Capturing,
    State,
    capture_in_training,
    expected_states,
    length_of,
    masked,
    packed,
    ragged,
    shifted_data_step,
    transformers_model,
)
from tests.support.models import Tiny, save_tiny
from tests.support.training import LAYOUTS, SEQ_LENGTH, VOCAB, Job, Outcome, batch_blocks, whole_weights

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
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_every_state_comes_once_and_is_that_of_a_plain_forward(
    world: int, recompute: str, folder: Path, start_ranks: Start
) -> None:
    """Four microbatches a step, and a validation after each."""
    settings = {"hook_points": POINTS, "phases": ("train", "validation")}
    jobs = [
        Job(
            steps=2,
            micro_batch_size=2,
            global_batch_size=8 * topology.dp,
            validation=8 * topology.dp,
            topology=topology,
            model=RECOMPUTE[recompute],
            trainer={"val_check_interval": 1},
        )
        for topology in LAYOUTS[world]
    ]
    runs = [Capturing(job=job, settings=settings, weights=True) for job in jobs]
    ranks = start_ranks(world, capture_in_training, folder, runs)
    for number, job in enumerate(jobs):
        check(folder, job, [rank[number] for rank in ranks])


def test_a_store_has_what_a_function_gets(folder: Path, tmp_path: Path, start_ranks: Start) -> None:
    """Of some samples alone, rounded; with virtual stages, and with replicas, whose samples alternate."""
    settings = {"hook_points": POINTS, "phases": ("train", "validation"), "samples": [1, 2, 7, 8], "dtype": "bf16"}
    runs = [
        Capturing(
            job=Job(steps=3, micro_batch_size=2, validation=4, topology=topology, trainer={"val_check_interval": 2}),
            settings=settings,
            store=tmp_path / f"store-{number}",
        )
        for number, topology in enumerate((Topology(pp=2, vp=2), Topology(dp=2)))
    ]
    ranks = start_ranks(2, capture_in_training, folder, runs)
    for number, run in enumerate(runs):
        found = dict(each for rank in ranks for each in rank[number].states)
        store = open_store(run.store)
        assert [(step.phase, step.step) for step in store.steps] == [
            ("train", 0),
            ("train", 1),
            ("validation", 2),
            ("train", 2),
            ("validation", 3),
        ]
        assert {(state.phase, state.step, state.sample) for state in found} == {
            *(("train", 0, sample) for sample in (1, 2)),
            ("train", 1, 7),
            *(("validation", step, sample) for step in (2, 3) for sample in (1, 2)),
            ("train", 2, 8),
        }
        for state, values in found.items():
            view = store.at(step=state.step, phase=state.phase)
            ids = [view.document(place).id for place in range(view.documents)]
            place = ids.index(f"{state.phase}/{state.step}/{state.sample}")
            row = place * SEQ_LENGTH + state.position
            assert view[state.point][row].float().numpy().tolist() == values.tolist()
        assert verify(run.store, full=True).findings == ()
        assert store.states * len(POINTS) == len(found)


def test_a_resumed_run_has_each_step_once(folder: Path, tmp_path: Path, start_ranks: Start) -> None:
    """It ends in the fifth step, after a checkpoint before the fourth, which is done again, in another layout."""
    settings = {"hook_points": POINTS}
    whole, parts, saved = tmp_path / "whole", tmp_path / "parts", tmp_path / "checkpoint"
    runs = [
        Capturing(job=Job(steps=6, topology=topology), settings=settings, store=store, saved=checkpoint)
        for topology, store, checkpoint in (
            (Topology(tp=2), whole, None),
            (Topology(tp=2), parts, saved),
            (Topology(pp=2), parts, saved),
        )
    ]
    start_ranks(2, capture_in_training, folder, runs)
    expected, found = open_store(whole), open_store(parts)
    assert [step.step for step in found.steps] == [step.step for step in expected.steps] == list(range(6))
    assert verify(parts, full=True).findings == ()
    for step in range(6):
        ours, theirs = found.at(step=step), expected.at(step=step)
        assert [ours.document(n).id for n in range(4)] == [theirs.document(n).id for n in range(4)]
        for point in POINTS:
            error = (ours[point][:] - theirs[point][:]).norm(dim=1) / theirs[point][:].norm(dim=1)
            assert error.max() < (PRECISE if step < 3 else 1e-3), (step, point)  # weights drift apart by layout


def test_padding_is_left_out_and_packed_documents_do_not_see_each_other(folder: Path, start_ranks: Start) -> None:
    """Padding is what the batch says, here of a token that occurs elsewhere."""
    settings = {"hook_points": POINTS}
    runs = [
        Capturing(
            job=Job(steps=1, micro_batch_size=2, topology=Topology(tp=2, sp=True)),
            settings=settings,
            weights=True,
            collate=ragged,
        ),
        Capturing(
            job=Job(steps=1, topology=Topology(pp=2)),
            settings=settings,
            weights=True,
            collate=packed,
        ),
        Capturing(
            job=Job(steps=1, topology=Topology(cp=2)),
            settings=settings,
            weights=True,
            collate=masked,
        ),
    ]
    padding, packing, masking = (
        list(found) for found in zip(*start_ranks(2, capture_in_training, folder, runs), strict=True)
    )
    model = transformers_model(folder, _weights(padding, 0))
    blocks = [block[:-1].tolist() for block in batch_blocks(4)]
    for ranks, parts in ((padding, None), (packing, PACKED), (masking, PACKED)):
        states = [each for rank in ranks for each in rank.states]
        found = {(state.sample, state.point, state.position): values for state, values in states}
        count = 0
        for sample, tokens in enumerate(blocks):
            start = 0
            for length in parts or (length_of(tokens[0]),):
                for point, expected in expected_states(model, [tokens[start : start + length]], POINTS).items():
                    for position, state in enumerate(expected[0]):
                        mine = found[sample, point, start + position]
                        assert np.linalg.norm(mine - state) / np.linalg.norm(state) < PRECISE, (sample, point, position)
                        count += 1
                start += length
            assert ranks[0].samples["train", 0, sample] == tokens[:start]
        assert len(states) == len(found) == count


def test_tokens_that_are_not_the_data_loaders_end_the_run(folder: Path, start_ranks: Start) -> None:
    """Of states on the last stage, too."""
    job = Job(steps=1, topology=Topology(pp=2), model={"data_step_fn": shifted_data_step})
    with pytest.raises(RankError, match="the model was given other token ids than the data loader gave"):
        start_ranks(2, capture_in_training, folder, [Capturing(job=job, settings={"hook_points": "final_norm"})])


def check(folder: Path, job: Job, ranks: list[Captured]) -> None:
    """All ranks together have every state of every sample exactly once, and each is right."""
    states = [each for rank in ranks for each in rank.states]
    found = dict(states)
    assert len(found) == len(states), "a state came twice"
    expected = 0
    for (phase, step), samples in samples_of(job).items():
        model = transformers_model(folder, _weights(ranks, step))
        references = expected_states(model, list(samples.values()), POINTS)
        for place, (sample, tokens) in enumerate(samples.items()):
            assert all(rank.samples.get((phase, step, sample), tokens) == tokens for rank in ranks)
            microbatch = sample % job.global_batch_size // (job.micro_batch_size * job.topology.dp)
            for point, reference in references.items():
                for position, state in enumerate(reference[place]):
                    mine = found[State(phase, step, microbatch, sample, point, position)]
                    error = np.linalg.norm(mine - state) / np.linalg.norm(state)
                    assert error < PRECISE, (job.topology, job.model, phase, step, sample, point, position)
                    expected += 1
    assert len(found) == expected == 4 * job.global_batch_size * SEQ_LENGTH * len(POINTS)


def samples_of(job: Job) -> dict[tuple[str, int], dict[int, list[int]]]:
    """By phase and step the number and the tokens of every sample, in Megatron's way of giving them out."""
    size = job.global_batch_size
    train, validation = batch_blocks(job.steps * size)[:, :-1], batch_blocks(job.validation, seed=12)[:, :-1]
    found = {}
    for step in range(job.steps):
        numbers = range(step * size, (step + 1) * size)
        found["train", step] = {number: train[number].tolist() for number in numbers}
        found["validation", step + 1] = {number: block.tolist() for number, block in enumerate(validation)}
    return found


def _weights(ranks: list[Captured], step: int) -> dict[str, np.ndarray]:
    return whole_weights([Outcome(pieces=rank.weights[step]) for rank in ranks])
