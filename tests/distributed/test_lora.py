"""Hidden states while a LoRA of NeMo's trains: they change nothing, come once, and are those of the weights with the
adapter added."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.checkpoint.distributed import DistributedFiles
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.store.read.reader import Store, open_store
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.capturing import Captured, State, expected_states, transformers_model
from tests.support.lora import ALPHA, DIM, Tuning, merged, tune
from tests.support.models import Tiny, save_tiny, write_documents
from tests.support.training import SEQ_LENGTH, VOCAB, Job, Outcome, batch_blocks, whole_weights

LAYERS = 4
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "mlp_act", "resid_post", "q", "k", "v", "z")
POINTS = ("embed", *(f"{site}@{layer}" for site in SITES for layer in (1, 2)), "final_norm")
PRECISE = 5e-6
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LENGTHS = (9, 16, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = Tiny(layers=LAYERS, groups=2, tied=True)
    return save_tiny(tmp_path_factory.mktemp("lora") / "model", tiny, vocab_size=VOCAB)


def weights_at(ranks: list[Captured], step: int) -> dict[str, np.ndarray]:
    return whole_weights([Outcome(pieces=rank.weights[step]) for rank in ranks])


def model_at(folder: Path, ranks: list[Captured], step: int) -> Any:
    """transformers' model with the weights of a step, the adapter added by numpy."""
    return transformers_model(folder, merged(weights_at(ranks, step)), torch.float64)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - expected) < PRECISE * np.linalg.norm(expected))


def test_states_are_those_of_the_weights_with_the_adapter(
    folder: Path, tmp_path: Path, start_ranks: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of training steps and of a probe set, in one and in two microbatches, with and without recompute."""
    documents = write_documents(tmp_path / "documents.jsonl", LENGTHS)
    runs = []
    for topology, samples, how in (
        (Topology(tp=2), 4, {}),
        (Topology(tp=2, sp=True), 2, FULL),
        (Topology(pp=2), 2, {}),
        (Topology(pp=2), 4, FULL),
    ):
        place = tmp_path / str(len(runs))
        job = Job(steps=2, lr=1e-2, micro_batch_size=samples, topology=topology, model=how)
        probe = {"hook_points": POINTS, "to": place / "probe", "documents": documents, "log": False}
        capture = {"hook_points": POINTS}
        runs.append(
            Tuning(
                job=job,
                logs=place / "logs",
                ours=bool(how),
                capture=capture,
                probe=probe,
                store=place / "states" if how else None,
            )
        )
    ranks = start_ranks(2, tune, folder, runs)
    for number, run in enumerate(runs):
        mine = [rank[number] for rank in ranks]
        models = [model_at(folder, mine, step) for step in range(run.job.steps)]
        check_training(models, run.job, mine)
        check_probes(models, open_store(tmp_path / str(number) / "probe"))
        if run.store is not None:
            store = open_store(run.store)
            assert [step.step for step in store.steps] == [0, 1]
            said = dict(store.manifest.model)
            adapter = said.pop("adapter")
            assert (adapter["kind"], adapter["dim"], adapter["alpha"]) == ("LoRA", DIM, ALPHA)
            # nothing of a fingerprint, neither of the weights below nor of the adapter, which is another in each step
            assert said.keys() == {"architecture"} and "sha256" not in adapter
            assert main(["inspect", str(run.store)]) == 0
            assert f"LoRA in training, dim {DIM}, alpha {ALPHA}" in capfd.readouterr().out


def check_training(models: list[Any], job: Job, ranks: list[Captured]) -> None:
    states = [each for rank in ranks for each in rank.states]
    found = dict(states)
    assert len(found) == len(states), "a state came twice"
    begin, end = weights_at(ranks, 0), weights_at(ranks, 1)
    count, blocks = 0, batch_blocks(job.steps * job.global_batch_size)[:, :-1]
    for name, values in begin.items():
        changed = np.abs(end[name] - values).reshape(values.shape[0], -1).max(axis=1)
        assert (changed > 1e-3).all() if ".adapter." in name else not changed.any(), name
    for step in range(job.steps):
        first = step * job.global_batch_size
        tokens = blocks[first : first + job.global_batch_size].tolist()
        for point, expected in expected_states(models[step], tokens, POINTS).items():
            for place in range(job.global_batch_size):
                for position in range(SEQ_LENGTH):
                    state = State("train", step, place // job.micro_batch_size, first + place, point, position)
                    assert same(found[state], expected[place, position]), (job.topology, job.model, state)
                    count += 1
    assert count == len(found)


def check_probes(models: list[Any], store: Store) -> None:
    """Of the step before each training step; those of the first have the adapter too."""
    assert [step.step for step in store.steps] == [0, 1, 2]
    for step, model in enumerate(models):
        view = store.at(step=step)
        for number in range(view.documents):
            document = view.document(number)
            for point, (states,) in expected_states(model, [document.token_id.tolist()], POINTS).items():
                found = document[point][:].numpy()
                assert len(found) == len(states) and all(map(same, found, states)), (step, number, point)


def test_what_nemos_own_leaves_out(folder: Path, tmp_path: Path, start_ranks: Start) -> None:
    """A failure here means that ``training.lora.LoRA`` can do with less."""
    pipeline = Job(steps=2, lr=1e-2, micro_batch_size=2, topology=Topology(pp=2), model=FULL)
    virtual = Job(steps=1, topology=Topology(pp=2, vp=2))
    runs = [
        Tuning(job=job, logs=tmp_path / f"{name}-logs", saved=tmp_path / name)
        for name, job in (("pipeline", pipeline), ("virtual", virtual))
    ]
    ranks = start_ranks(2, tune, folder, runs)
    begin, end = (weights_at([rank[0] for rank in ranks], step) for step in (0, 1))
    for name, values in begin.items():
        if ".adapter." in name:  # by layer; what the first stage's change by is weight decay
            changed = np.abs(end[name] - values).reshape(LAYERS, -1).max(axis=1)
            assert (changed[:2] < 1e-3).all() and (changed[2:] > 1e-3).all(), name
    kept, dropped = (
        [name for name in DistributedFiles.of(run.saved / "weights", "here").tensors if ".adapter." in name]
        for run in runs
        if run.saved is not None
    )
    assert any(name.startswith("module.") for name in kept)
    assert dropped and all(name.startswith("optimizer.") for name in dropped)
    said = json.loads((tmp_path / "pipeline" / "weights" / "adapter_metadata.json").read_text())
    assert said == {"model_ckpt_path": "None"}  # where it would go on from


def test_a_run_is_the_same_bit_by_bit(folder: Path, tmp_path: Path, start_ranks: Start) -> None:
    """Losses, gradients, weights, those of adapters too, and random states after each of five steps, with dropout."""
    documents = write_documents(tmp_path / "documents.jsonl", LENGTHS)
    runs = []
    for topology in (Topology(tp=2, sp=True), Topology(pp=2)):
        for captured in (False, True):
            place = tmp_path / str(len(runs))
            watched = {"hook_points": POINTS, "every": 2}
            probe = {**watched, "to": place / "probe", "documents": documents, "log": False}
            runs.append(
                Tuning(
                    job=Job(steps=5, micro_batch_size=2, topology=topology, model={"hidden_dropout": 0.1}),
                    logs=place / "logs",
                    lora={"dropout": 0.2},
                    capture=watched if captured else None,
                    probe=probe if captured else None,
                    weights=False,
                )
            )
    for found in start_ranks(2, tune, folder, runs):
        for without, captured in zip(found[::2], found[1::2], strict=True):
            assert not without.states and {state.step for state, _ in captured.states} == {0, 2, 4}
            assert len(captured.fingerprints) == 5 and len(set(captured.fingerprints)) == 5
            assert captured.fingerprints == without.fingerprints
            assert captured.losses == without.losses
