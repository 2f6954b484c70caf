"""The list of hypotheses: documented, each one a change, and together they explain two faults at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden.doctor import inputs, layers, orders, weights
from nemo_qwen_hidden.doctor.checkup import chosen
from nemo_qwen_hidden.doctor.observation import Observation, Passage
from nemo_qwen_hidden.doctor.reference import Reference
from nemo_qwen_hidden.hookpoint import HookPoint, by_depth
from tests.doctor import planted
from tests.doctor.planted import Case
from tests.doctor.test_planted import findings, observed
from tests.support.models import Tiny, save_tiny

torch.set_num_threads(1)
DOCUMENT = Path(__file__).parents[2] / "docs" / "doctor.md"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = save_tiny(tmp_path_factory.mktemp("hypotheses") / "model", Tiny(layers=4, groups=2, tied=True))
    generator = torch.Generator().manual_seed(31)
    return Case(folder, tuple(torch.randint(0, 383, (length,), generator=generator) for length in (12, 25, 7)))


@pytest.fixture(scope="module")
def reference(case: Case) -> Reference:
    return Reference(case.folder)


def test_every_fault_is_in_the_document(reference: Reference, case: Case) -> None:
    observation = observed(case, case.run())
    hypotheses = [
        *weights.hypotheses(reference),
        *layers.hypotheses(reference, HookPoint("resid_post", 1)),
        *inputs.hypotheses(reference),
        *orders.hypotheses(observation, tuple(observation.states)),
    ]
    text = DOCUMENT.read_text()
    assert [each.fault for each in hypotheses if f"`{each.fault}`" not in text] == []
    assert len(hypotheses) > 150


def test_a_hypothesis_leaves_the_reference_as_it_was(reference: Reference, case: Case) -> None:
    """Each changes the model of transformers in place, and puts it back."""
    passages = (Passage(document=0, token_ids=case.documents[0]),)
    points = by_depth(case.run(), 4)
    observation = Observation(passages=passages, states={}, compute="fp32", stored="fp32")
    before = reference.run(observation, points)
    weights_before = {name: value.clone() for name, value in reference.model.state_dict().items()}
    for hypothesis in (*weights.hypotheses(reference), *layers.hypotheses(reference, HookPoint("resid_post", 1))):
        hypothesis.expect(reference, observation, points)
    after = reference.run(observation, points)
    assert all(torch.equal(before[point], after[point]) for point in points)
    assert all(torch.equal(value, weights_before[name]) for name, value in reference.model.state_dict().items())


def test_the_reference_is_what_plain_hooks_see(reference: Reference, case: Case) -> None:
    seen = case.run()
    found = reference.run(observed(case, seen), seen)
    assert all(torch.equal(found[point], seen[point]) for point in seen)


def test_two_faults_at_once_are_both_named(reference: Reference, case: Case) -> None:
    class Both(Case):
        def run(self, model: object = None, **inputs: object) -> planted.States:
            return planted.rope_base(case, 1e4)

    states = planted.rows_of_each(Both(case.folder, case.documents), lambda length: planted.zigzag(length, 2))
    found = findings({"fp32": reference}, observed(case, states))
    assert [each.fault for each in found] == ["tokens-permuted", "rope-base"], found


def test_a_layer_left_out_and_another_fault(reference: Reference, case: Case) -> None:
    """Hypotheses about weights are tried on a model that lacks a layer."""
    model = case.changed(lambda model: model.layers[1].register_forward_hook(lambda _m, args, _out: args[0]))
    other = Run(case.folder, case.documents, model)
    moved = planted.rows_of_each(other, lambda length: planted.zigzag(length, 2))
    found = findings({"fp32": reference}, observed(case, {p: v for p, v in moved.items() if p.site in _STREAM}))
    assert [each.fault for each in found] == ["tokens-permuted", "layers-out-of-order"], found
    assert "layer 1 is left out" in found[1].says


_STREAM = ("embed", "resid_post", "final_norm")


class Run(Case):
    """Runs another model in the place of its own."""

    def __init__(self, folder: Path, documents: tuple[torch.Tensor, ...], other: Any) -> None:
        super().__init__(folder, documents)
        object.__setattr__(self, "other", other)

    def run(self, model: Any = None, **inputs: Any) -> planted.States:
        return super().run(model or self.other, **inputs)  # type: ignore[attr-defined]


def test_documents_are_chosen_by_how_different_their_lengths_are() -> None:
    assert chosen([5, 0, 9, 1, 7, 3], 3) == [0, 2, 3]  # of 1, 5 and 9 tokens
    assert chosen([4, 0, 2], 8) == [0, 2]
    assert chosen([4, 6, 2], 1) == [0]
