"""``ProbeSetCallback`` in NeMo's Trainer: it changes nothing, and its states are those of the model at that step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_qwen_hidden.drift.measures import measure
from nemo_qwen_hidden.store.read.reader import Store, open_store
from nemo_qwen_hidden.store.upkeep.verify import verify
from tests.conftest import Start
from tests.support.capturing import expected_states, transformers_model
from tests.support.models import Tiny, save_tiny, write_documents
from tests.support.probing import Probed, Probing, probe_in_training
from tests.support.training import LAYOUTS, VOCAB, Job, Outcome, whole_weights

LAYERS = 8
POINTS = ("embed", "resid_post@0", "mlp_act@3", "z@5", "resid_post@7", "final_norm")
LENGTHS = (9, 14, 3, 16, 7, 16)
STEPS, EVERY = 20, 8
PRECISE = 5e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = Tiny(layers=LAYERS, groups=2, tied=True)
    return save_tiny(tmp_path_factory.mktemp("probing") / "model", tiny, vocab_size=VOCAB)


@pytest.mark.parametrize("world", LAYOUTS)
def test_training_is_the_same_and_states_are_those_of_each_step(
    world: int, folder: Path, tmp_path: Path, start_ranks: Start
) -> None:
    """Losses, gradients, weights and random states after each of 20 steps, bit by bit, with dropout in training."""
    documents = write_documents(tmp_path / "documents.jsonl", LENGTHS)
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    runs = []
    for number, topology in enumerate(LAYOUTS[world]):
        job = Job(steps=STEPS, topology=topology, model=dropout)
        settings: dict[str, Any] = {"hook_points": POINTS, "to": tmp_path / str(number), "every": EVERY}
        settings |= {"documents": documents, "batch_tokens": 24, "packing": number % 2 == 0}
        runs.append(Probing(job=job, settings=None))
        runs.append(Probing(job=job, settings=settings, weights=True, events=tmp_path / f"events-{number}"))
    ranks = start_ranks(world, probe_in_training, folder, runs)
    for number, run in enumerate(runs[1::2]):
        without, probed = ([rank[2 * number + which] for rank in ranks] for which in (0, 1))
        for one, other in zip(without, probed, strict=True):
            assert len(one.fingerprints) == STEPS
            assert one.fingerprints == other.fingerprints and one.losses == other.losses
            assert one.training == other.training and one.hooks == other.hooks and all(one.training)
        store = open_store(tmp_path / str(number))
        assert [(entry.phase, entry.step) for entry in store.steps] == [("probe", step) for step in (0, 8, 16)]
        for step in (0, 8, 16):
            check_states(store, step, folder, probed)
        check_events(tmp_path / f"events-{number}", store)
        assert verify(store.path, full=True).findings == (), run.job.topology


def check_states(store: Store, step: int, folder: Path, ranks: list[Probed]) -> None:
    outcomes = [Outcome(pieces=rank.weights[step]) for rank in ranks]
    model, view = transformers_model(folder, whole_weights(outcomes)), store.at(step=step)
    assert view.documents == len(LENGTHS)
    for number in range(view.documents):
        document = view.document(number)
        assert document.id == f"probe/{step}/documents-{number}"
        for point, (states,) in expected_states(model, [document.token_id.tolist()], POINTS).items():
            for position, state in enumerate(states):
                mine = document[point][position].numpy()
                assert np.linalg.norm(mine - state) < PRECISE * np.linalg.norm(state), (step, number, point, position)


def check_events(folder: Path, store: Store) -> None:
    """What TensorBoard shows is what is measured afterwards."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    for step in (0, 8, 16):
        for name, value in measure(store, step=step).items():
            logged = {event.step: event.value for event in events.Scalars(name)}
            assert logged[step] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, step)
    assert any("accuracy" in name for name in events.Tags()["scalars"])
