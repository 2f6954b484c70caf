"""Each planted fault is named right, and none is seen where there is none."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_qwen_hidden.doctor.diagnose import Diagnosis
from nemo_qwen_hidden.doctor.noise import noise_of
from nemo_qwen_hidden.doctor.observation import Observation, Passage
from nemo_qwen_hidden.doctor.reference import Reference
from nemo_qwen_hidden.doctor.report import Finding
from nemo_qwen_hidden.hookpoint import HookPoint, by_depth
from tests.doctor import planted
from tests.doctor.planted import Case, States
from tests.support.models import Tiny, save_tiny

torch.set_num_threads(1)
LENGTHS = (17, 40, 1, 29, 6, 33)
LAYERS = 4
Plant = Callable[[Case], States]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = save_tiny(tmp_path_factory.mktemp("planted") / "model", Tiny(layers=LAYERS, groups=2, tied=True))
    generator = torch.Generator().manual_seed(11)
    return Case(folder, tuple(torch.randint(0, 383, (length,), generator=generator) for length in LENGTHS))


@pytest.fixture(scope="module")
def references(case: Case) -> dict[str, Reference]:
    return {dtype: Reference(case.folder, dtype=dtype) for dtype in ("fp32", "bf16", "fp16")}


def observed(case: Case, states: States, **claims: str) -> Observation:
    passages = tuple(Passage(document=index, token_ids=ids) for index, ids in enumerate(case.documents))
    in_order = {point: states[point] for point in by_depth(states, LAYERS)}
    return Observation(passages=passages, states=in_order, **{"compute": "fp32", "stored": "fp32", **claims})


def findings(references: dict[str, Reference], observation: Observation) -> list[Finding]:
    reference = references["fp32"]
    truth = reference.run(observation, observation.states)
    coarse = None if observation.compute == "fp32" else references[observation.compute]
    noise = noise_of(reference, observation, truth, coarse)
    return Diagnosis(reference, observation, truth, noise, references.__getitem__).findings()


def at(name: str) -> HookPoint:
    return HookPoint.parse(name)


def _swap(states: States, one: str, other: str) -> None:
    states[at(one)], states[at(other)] = states[at(other)], states[at(one)]


def _to_nan(states: States) -> None:
    states[at("resid_post@2")][5, 3] = torch.nan


def _noisy_row(states: States) -> None:
    states[at("resid_post@1")][60] = torch.randn(64, generator=torch.Generator().manual_seed(0))


def _dead_unit(states: States) -> None:
    states[at("resid_post@3")][:, 9] = 0


def _clip(states: States) -> None:
    for name in ("resid_mid@3", "resid_post@3"):
        states[at(name)].clamp_(-1.5, 1.5)


def _normed(case: Case) -> Callable[[States], None]:
    def edit(states: States) -> None:
        with torch.no_grad():
            for layer in range(LAYERS):
                states[at(f"resid_post@{layer}")] = case.model.norm(states[at(f"resid_post@{layer}")])

    return edit


FAULTS: dict[str, tuple[Plant, str, str]] = {
    # plant, fault, a word of the sentence
    "rope base in a list": (lambda c: planted.rope_base(c, 1e4), "rope-base", "10000"),
    "rope base in no list": (lambda c: planted.rope_base(c, 31415.0), "rope-base", "about 31,41"),
    "rope interleaved": (planted.rope_interleaved, "rope-interleaved", "neighbouring"),
    "no QKV bias": (lambda c: planted.zero_biases(c, "q", "k", "v"), "qkv-bias-missing", "Q, K, V"),
    "no K bias": (lambda c: planted.zero_biases(c, "k"), "qkv-bias-missing", "of K is"),
    "gate and up": (planted.gate_and_up_swapped, "gate-up-swapped", "gate and up"),
    "norm epsilon": (lambda c: planted.norm_epsilon(c, 1e-3), "norm-epsilon", "0.001"),
    "norm without weight": (lambda c: planted.norm_weights(c, torch.ones_like), "norm-weight-missing", "the norms"),
    "norm with 1 + weight": (lambda c: planted.norm_weights(c, lambda w: w + 1), "norm-weight-plus-one", "1 + weight"),
    "stages swapped": (lambda c: planted.layers_in_order(c, [2, 3, 0, 1]), "layers-out-of-order", "2 pipeline stages"),
    "virtual stages": (lambda c: planted.layers_in_order(c, [0, 2, 1, 3]), "layers-out-of-order", "virtual"),
    "a layer twice": (lambda c: planted.layers_in_order(c, [0, 1, 1, 3]), "layers-out-of-order", "layer 1 runs in"),
    "fused QKV by rows": (planted.qkv_rows_in_order, "qkv-layout", "query group"),
    "attention not summed": (lambda c: planted.half_of_a_sum(c, "self_attn.o_proj"), "not-summed", "of attention"),
    "nothing summed": (
        lambda c: planted.half_of_a_sum(c, "self_attn.o_proj", "mlp.down_proj"),
        "not-summed",
        "rank 0 of 2",
    ),
    "embeddings times 8": (lambda c: planted.multiplied_embeddings(c, 8.0), "embedding-scaled", "sqrt"),
    "GELU": (planted.gelu, "activation", "GELU"),
    "one layer of other weights": (lambda c: planted.other_weights_in_layer(c, 2), "few-layers", "other weights"),
    "other weights": (planted.fine_tuned, "unexplained", "no hypothesis"),
    "dropout": (lambda c: planted.with_dropout(c, 0.1), "dropout", "%"),
    "not causal": (planted.not_causal, "not-causal", "after it"),
    "documents leak": (lambda c: planted.documents_leak(c, anew=True), "documents-leak", "anew"),
    "documents leak, positions go on": (lambda c: planted.documents_leak(c, anew=False), "documents-leak", "go on"),
    "positions doubled": (lambda c: planted.positions(c, lambda p: p * 2), "rope-scaled", "multiplied by 2"),
    "positions of two ranks": (
        lambda c: planted.positions(c, lambda p: p % -(-len(p) // 2)),
        "positions-of-ranks",
        "2 equal parts",
    ),
    "left padding seen": (lambda c: planted.padded_left(c, masked=False, misread=False), "padding-seen", "token 0"),
    "left padding misread": (lambda c: planted.padded_left(c, masked=True, misread=True), "padding-side", "masked"),
    "token ids plus one": (lambda c: planted.renamed_tokens(c, lambda t: (t + 1) % 383), "vocabulary", "+1"),
    "vocabulary ranges": (planted.vocabulary_halves_swapped, "vocabulary", "2 tensor parallel"),
    "zig-zag of 2": (
        lambda c: planted.rows_of_each(c, lambda n: planted.zigzag(n, 2)),
        "tokens-permuted",
        "zig-zag of 2",
    ),
    "zig-zag of 4": (
        lambda c: planted.rows_of_each(c, lambda n: planted.zigzag(n, 4)),
        "tokens-permuted",
        "zig-zag of 4",
    ),
    "stripes": (lambda c: planted.rows_of_each(c, planted.second_half_first), "tokens-permuted", "stripes of 2"),
    "shuffled": (lambda c: planted.rows_of_each(c, planted.shuffled), "tokens-permuted", "no layout"),
    "documents reversed": (
        lambda c: planted.documents_in_order(c, [5, 4, 3, 2, 1, 0]),
        "documents-permuted",
        "reversed",
    ),
    "token by token": (planted.token_by_token, "axes-swapped", "token by token"),
    "one layer early": (planted.one_layer_early, "layer-off-by-one", "earlier"),
    "transformers' tuple": (planted.hidden_states_tuple, "after-final-norm", "resid_post@3"),
    "two layers swapped": (
        lambda c: planted.edited(c, lambda s: _swap(s, "resid_post@0", "resid_post@2")),
        "layers-permuted",
        "other layers",
    ),
    "between attention and MLP": (
        lambda c: planted.edited(c, lambda s: _swap(s, "resid_mid@1", "resid_post@1")),
        "wrong-site",
        "resid_mid",
    ),
    "final norm left out": (
        lambda c: planted.edited(c, lambda s: s.update({at("final_norm"): s[at("resid_post@3")]})),
        "before-final-norm",
        "before",
    ),
    "norm on every layer": (lambda c: planted.edited(c, _normed(c)), "norm-on-every-layer", "applied"),
    "a value is NaN": (lambda c: planted.edited(c, _to_nan), "not-finite", "token 5"),
    "one row": (lambda c: planted.edited(c, _noisy_row), "few-rows", "few rows"),
    "one unit": (lambda c: planted.edited(c, _dead_unit), "few-units", "units"),
    "clipped": (lambda c: planted.edited(c, _clip), "clipped", "1.5"),
    "stored in bf16": (lambda c: planted.cast(c, torch.bfloat16), "rounded", "bf16"),
    "stored in fp16": (lambda c: planted.cast(c, torch.float16), "rounded", "fp16"),
    "computed in bf16": (lambda c: planted.computed_in(c, torch.bfloat16), "computed-coarsely", "bf16"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str, case: Case, references: dict[str, Reference]) -> None:
    plant, fault, word = FAULTS[name]
    found = findings(references, observed(case, plant(case)))
    assert [each.fault for each in found] == [fault], found
    assert word in found[0].says, found


def test_nothing_is_wrong_with_a_healthy_model(case: Case, references: dict[str, Reference]) -> None:
    assert findings(references, observed(case, case.run())) == []


COARSE = (
    "rope base in a list",
    "no K bias",
    "gate and up",
    "virtual stages",
    "fused QKV by rows",
    "documents leak",
    "left padding misread",
    "zig-zag of 2",
    "one layer early",
    "transformers' tuple",
    "one unit",
    "clipped",
)


@pytest.mark.parametrize("name", COARSE)
def test_a_planted_fault_is_named_in_bf16(name: str, case: Case, references: dict[str, Reference]) -> None:
    plant, fault, word = FAULTS[name]
    states = plant(InBf16(case.folder, case.documents))
    found = findings(references, observed(case, states, compute="bf16", stored="bf16"))
    assert [each.fault for each in found] == [fault], found
    assert word in found[0].says, found


class InBf16(Case):
    """Runs its models in bf16."""

    def run(self, model: Any = None, **inputs: Any) -> States:
        return super().run(copy.deepcopy(model or self.model).to(torch.bfloat16), **inputs)


def test_states_of_another_width(case: Case, references: dict[str, Reference]) -> None:
    states = {point: values[:, :32] for point, values in case.run().items()}
    assert [each.fault for each in findings(references, observed(case, states))] == ["other-width"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_nothing_is_wrong_with_a_dtype_that_is_claimed(
    dtype: str, case: Case, references: dict[str, Reference]
) -> None:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert findings(references, observed(case, planted.cast(case, torch_dtype), stored=dtype)) == []
    computed = planted.computed_in(case, torch_dtype)
    assert findings(references, observed(case, computed, compute=dtype, stored=dtype)) == []
