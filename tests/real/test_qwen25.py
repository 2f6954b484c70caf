"""Real weights (Qwen2.5-Coder-0.5B-Instruct) on real text: every site in many layouts, an edit, a part of the model,
against transformers.

``make real`` fetches the weights and sets NQH_REAL_MODEL.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, LAYER_SITES, RESID_POST, HookPoint
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.hf_sites import transformers_sites
from tests.support.models import Batch, transformers_states
from tests.support.ranks import EVERYTHING, gathered, in_each_layout, loaded

pytestmark = pytest.mark.real

BOUND = 5e-6
LAYERS = (0, 11, 23)
HEADS = (1, 7, 13)  # one of them on the other tp rank
Layout = tuple[Topology, dict[str, Any]]
AT_ONCE: dict[str, list[Layout]] = {
    "two ranks, tp and pp": [
        (Topology(tp=2), {}),
        (Topology(tp=2, sp=True), {}),
        (Topology(pp=2), {"first_layers": 10}),
        (Topology(pp=2, vp=2), {}),
    ],
    "two ranks, cp and dp": [
        (Topology(cp=2), {}),
        (Topology(dp=2), {}),
    ],
    "three ranks": [(Topology(pp=3), {"layout": "Et*6|t*10|t*8L"}), (Topology(cp=3), {})],
    "four ranks": [
        (Topology(tp=2, pp=2), {}),
        (Topology(tp=2, pp=2, sp=True), {}),
        (Topology(tp=2, dp=2), {}),
        (Topology(pp=4), {}),
    ],
    "four ranks, cp": [
        (Topology(tp=2, cp=2), {}),
        (Topology(tp=2, cp=2, sp=True), {}),
        (Topology(pp=2, cp=2), {}),
        (Topology(pp=2, vp=2, cp=2), {}),
    ],
}
States = dict[HookPoint, Any]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(os.environ["NQH_REAL_MODEL"])


@pytest.fixture(scope="module")
def batch(folder: Path) -> Batch:
    """Three ragged pieces of the standard library's own sources."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, fix_mistral_regex=False)
    source = inspect.getsource(json)
    encoded = [tokenizer(source[start:stop])["input_ids"] for start, stop in ((0, 700), (1500, 1750), (3000, 3060))]
    lengths = tuple(len(ids) for ids in encoded)
    padded = [[*ids, *[tokenizer.pad_token_id] * (max(lengths) - len(ids))] for ids in encoded]
    return Batch(torch.tensor(padded), lengths)


def mask_of(batch: Batch) -> torch.Tensor:
    """Every seventh token."""
    return (torch.arange(batch.input_ids.shape[1]) % 7 == 5).expand_as(batch.input_ids)


def options(batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every layer's output, and every site of some layers; of attention weights some heads and tokens."""
    others = [f"{site}@{layer}" for site in LAYER_SITES if site != ATTN_WEIGHTS for layer in LAYERS]
    weights = [f"{ATTN_WEIGHTS}@{layer}" for layer in LAYERS]
    return {"hook_points": [*EVERYTHING, *others]}, {"hook_points": weights, "heads": HEADS, "mask": mask_of(batch)}


def padded(documents: list[dict[HookPoint, torch.Tensor]], batch: Batch) -> States:
    """transformers' states of single documents as [batch, tokens, *shape], with what is left out set to zero."""
    tokens, found = batch.input_ids.shape[1], {}
    for point in documents[0]:
        states = [document[point].float() for document in documents]
        if point.site == ATTN_WEIGHTS:
            chosen = zip(states, mask_of(batch), strict=True)
            states = [state[:, list(HEADS)] * mask[: len(state), None, None] for state, mask in chosen]
            states = [torch.nn.functional.pad(state, (0, tokens - len(state))) for state in states]
        whole = torch.zeros(len(states), tokens, *states[0].shape[1:])
        for row, state in enumerate(states):
            whole[row, : len(state)] = state
        found[point] = whole.numpy()
    return found


def by_transformers(folder: Path, batch: Batch, dtype: torch.dtype) -> States:
    documents = transformers_sites(folder, batch, dtype)
    kept = [point for point in documents[0] if point.site == RESID_POST or point.layer in (None, *LAYERS)]
    return padded([{point: document[point] for point in kept} for document in documents], batch)


@pytest.fixture(scope="module")
def every_site(folder: Path, batch: Batch) -> States:
    return by_transformers(folder, batch, torch.float32)


@pytest.fixture(scope="module")
def bounds(folder: Path, batch: Batch, every_site: States) -> dict[HookPoint, float]:
    """BOUND, or what transformers in fp32 is itself off transformers in float64 where that is more: in the attention of
    layer 0, whose keys have large biases and with them large scores."""
    own = errors(every_site, by_transformers(folder, batch, torch.float64))
    return {point: max(BOUND, error) for point, error in own.items()}


@pytest.fixture(scope="module")
def one_rank(folder: Path, batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> States:
    log = tmp_path_factory.mktemp("one") / "ranks.log"
    ((found,),) = run_ranks(in_each_layout, ([(Topology(), {})], folder, batch, options(batch)), world=1, log=log)
    return found[0] | found[1]


def errors(states: States, reference: States) -> dict[HookPoint, float]:
    """Relative norm error of each hook point over all tokens of the batch."""
    found = {}
    for point, values in states.items():
        expected = reference[point].ravel().astype(np.float64)
        found[point] = float(np.linalg.norm(values.ravel() - expected) / np.linalg.norm(expected))
    return found


def worst(found: dict[HookPoint, float]) -> str:
    """The largest error, and the largest of the states between layers."""
    largest = max(found, key=lambda point: found[point])
    old = max(error for point, error in found.items() if point.site in ("embed", "resid_post", "final_norm"))
    return f"{found[largest]:.2e} at {largest}, {old:.2e} at embed, resid_post and final_norm"


def test_every_site_on_one_rank(one_rank: States, every_site: States, bounds: dict[HookPoint, float]) -> None:
    found = errors(one_rank, every_site)
    print(f"{Topology()}: {worst(found)}")
    assert len(found) == 26 + (len(LAYER_SITES) - 1) * len(LAYERS)
    assert {str(point) for point, bound in bounds.items() if bound > BOUND} <= {"z@0", "attn_out@0", "attn_weights@0"}
    assert all(error <= bounds[point] for point, error in found.items())


@pytest.mark.parametrize("layouts", AT_ONCE.values(), ids=AT_ONCE)
def test_every_site_in_fp32(
    layouts: list[Layout],
    folder: Path,
    batch: Batch,
    every_site: States,
    bounds: dict[HookPoint, float],
    one_rank: States,
    start_ranks: Start,
) -> None:
    world = layouts[0][0].world
    everyone = start_ranks(world, in_each_layout, layouts, folder, batch, options(batch))
    for (topology, split), results in zip(layouts, everyone[0], strict=True):
        states = results[0] | results[1]
        assert set(states) == set(one_rank)
        found, other = errors(states, every_site), errors(states, one_rank)
        differ = sum(not np.array_equal(states[point], one_rank[point]) for point in states)
        print(f"{topology} {split or ''}: {worst(found)}; from one rank {worst(other)}, {differ} in other bits")
        assert all(error <= bounds[point] for point, error in found.items())
        assert max(other.values()) <= BOUND
        if topology.tp == topology.cp == 1:
            assert not differ


def steering(hidden: int = 896) -> torch.Tensor:
    return torch.randn(hidden, generator=torch.Generator().manual_seed(1))


def steered_and_continued(rank: Rank, topology: Topology, folder: Path, batch: Batch) -> Any:
    """Logits of some tokens with and without a vector added after layer 11, what comes next, and layers 8 to 15 run on
    the states of the whole model."""
    from nemo_qwen_hidden.capture import edits
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    ids, lengths = batch.input_ids, batch.lengths
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, output_layer=True)
        steered = edits.add("resid_post@11", steering())
        logits = [
            model.logits(ids, lengths=lengths, mask=mask_of(batch), edits=chosen).numpy() for chosen in ((), [steered])
        ]
        new = model.generate(ids[2:, : lengths[2]], tokens=3, edits=[steered])
        whole = model.hidden_states(
            ids, lengths=lengths, hook_points=["resid_post@7", "z@11", "resid_post@15"], gather="all"
        )
        given, *expected = whole.values()
        ran = model.run(given, start=8, stop=16, hook_points=["z@11", "resid_post@15"], lengths=lengths)
    return logits, new, [states.numpy() for states in ran.values()], [states.numpy() for states in expected]


def test_an_edit_and_a_part_of_the_model(folder: Path, batch: Batch, start_ranks: Start) -> None:
    from transformers import AutoModelForCausalLM

    results = start_ranks(4, steered_and_continued, Topology(tp=2, pp=2), folder, batch)
    logits, new, ran, whole = results[0]
    assert len(ran) == 2 and all(np.array_equal(*pair) for pair in zip(ran, whole, strict=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(ids[None], use_cache=False).logits[0]
        return found

    def expected() -> np.ndarray:
        documents = zip(batch.input_ids, batch.lengths, mask_of(batch), strict=True)
        return torch.cat([logits_of(ids[:length])[mask[:length]] for ids, length, mask in documents]).numpy()

    plain = expected()
    model.model.layers[11].register_forward_hook(lambda _module, _inputs, output: output + steering())
    steered = expected()
    for ours, theirs in zip(logits, (plain, steered), strict=True):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        print(f"logits: relative norm error {error:.2e}")
        assert error <= BOUND
    print(f"the vector changes the logits by {np.linalg.norm(steered - plain) / np.linalg.norm(plain):.2f}")
    sequence = batch.input_ids[2, : batch.lengths[2]]
    for token in new[0]:
        assert token == int(logits_of(sequence)[-1].argmax())
        sequence = torch.cat([sequence, torch.tensor([token])])


def test_bf16_is_as_close_to_fp32_as_transformers_is(folder: Path, batch: Batch, start_ranks: Start) -> None:
    truth = padded(transformers_states(folder, batch), batch)
    theirs = errors(padded(transformers_states(folder, batch, torch.bfloat16), batch), truth)
    ((states,),) = start_ranks(1, gathered, Topology(), [folder], batch, ({},), "bf16")[0]
    ours = errors(states, truth)
    for point in truth:
        print(f"{point}: {ours[point]:.4f} here, {theirs[point]:.4f} by transformers")
    assert all(ours[point] <= 1.2 * theirs[point] for point in truth)


def test_a_rank_reads_its_own_weights_and_little_more(folder: Path, start_ranks: Start) -> None:
    """Peak of a rank's own memory: its parameters plus its part of one tensor, and what Python and Megatron allocate
    beside; no output layer on any stage."""
    embedding_part_bytes = 151936 * 896 * 4 // 2
    for own, growth, names in start_ranks(4, loaded, Topology(tp=2, pp=2), folder, "fp32"):
        assert growth <= own + embedding_part_bytes + 64 * 2**20
        assert not any("output_layer" in name for name in names)
