"""The reference that layouts are compared with, checked against transformers' own outputs and the layer's equations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, LAYER_SITES, SITES, HookPoint, by_depth
from tests.support.hf_sites import transformers_sites
from tests.support.models import TINY, Batch, Tiny, ragged_batch, relative_error, transformers_states

BATCH = ragged_batch((11, 1, 20))

Documents = list[dict[HookPoint, torch.Tensor]]


@pytest.fixture(params=TINY, ids=lambda tiny: tiny.name)
def tiny(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def documents(tiny: Tiny, tiny_folders: dict[Tiny, Path]) -> Documents:
    return transformers_sites(tiny_folders[tiny], BATCH)


@pytest.fixture
def model(tiny: Tiny, tiny_folders: dict[Tiny, Path]) -> Any:
    from transformers import Qwen2ForCausalLM

    return (
        Qwen2ForCausalLM.from_pretrained(tiny_folders[tiny], attn_implementation="eager").eval().requires_grad_(False)
    )


def at(document: dict[HookPoint, torch.Tensor], layer: int, *sites: str) -> list[torch.Tensor]:
    return [document[HookPoint(site, layer)] for site in sites]


def test_every_site_of_every_layer(documents: Documents, tiny: Tiny) -> None:
    expected = {HookPoint(site, layer) for site in LAYER_SITES for layer in range(tiny.layers)}
    expected |= {HookPoint("embed"), HookPoint("final_norm")}
    for document, tokens in zip(documents, BATCH.lengths, strict=True):
        assert set(document) == expected
        for point, state in document.items():
            whole = (tiny.heads, tokens) if point.site == ATTN_WEIGHTS else (state.shape[-1],)
            assert state.shape == (tokens, *whole), point


def test_what_transformers_gives_out_itself(documents: Documents, model: Any, tiny: Tiny, tiny_folders: Any) -> None:
    for row, document in enumerate(transformers_states(tiny_folders[tiny], BATCH)):
        for point, state in document.items():
            assert relative_error(documents[row][point], state) < 1e-6, point  # scaled_dot_product_attention there
    for row, length in enumerate(BATCH.lengths):
        with torch.no_grad():
            given = model(BATCH.input_ids[row : row + 1, :length], output_attentions=True).attentions
        for layer, weights in enumerate(given):
            assert documents[row][HookPoint(ATTN_WEIGHTS, layer)].equal(weights[0].transpose(0, 1))


def test_the_equations_of_a_layer(documents: Documents, model: Any, tiny: Tiny) -> None:
    shared = tiny.heads // tiny.groups  # heads that share a key and a value
    for document, tokens in zip(documents, BATCH.lengths, strict=True):
        future = torch.ones(tokens, tokens).triu(1).bool()
        for index, layer in enumerate(model.model.layers):
            pre, mid, post = at(document, index, "resid_pre", "resid_mid", "resid_post")
            attn_out, mlp_out, z, mlp_act = at(document, index, "attn_out", "mlp_out", "z", "mlp_act")
            v, rot_q, rot_k = (
                state.unflatten(1, (-1, layer.self_attn.head_dim))
                for state in at(document, index, "v", "rot_q", "rot_k")
            )
            assert mid.equal(pre + attn_out)
            assert post.equal(mid + mlp_out)
            assert relative_error(z @ layer.self_attn.o_proj.weight.T, attn_out) < 1e-6
            assert relative_error(mlp_act @ layer.mlp.down_proj.weight.T, mlp_out) < 1e-6
            scores = torch.einsum("qhd,khd->qhk", rot_q, rot_k.repeat_interleave(shared, 1)) / rot_q.shape[2] ** 0.5
            weights = scores.masked_fill(future[:, None], float("-inf")).softmax(2)
            assert relative_error(weights, document[HookPoint(ATTN_WEIGHTS, index)]) < 1e-6
            mixed = torch.einsum("qhk,khd->qhd", weights, v.repeat_interleave(shared, 1))
            assert relative_error(mixed.flatten(1), z) < 1e-6


def test_rotation_by_complex_numbers(documents: Documents, model: Any, tiny: Tiny) -> None:
    """Su et al. 2021, eq. 14: pair (j, j + d/2) of a head, as a complex number, turned by position x theta^(-2j/d)."""
    half = model.model.layers[0].self_attn.head_dim // 2
    frequencies = model.config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    for document, tokens in zip(documents, BATCH.lengths, strict=True):
        angles = torch.arange(tokens, dtype=torch.float64)[:, None, None] * frequencies
        for layer in range(tiny.layers):
            for before, after in (("q", "rot_q"), ("k", "rot_k")):
                plain, rotated = (
                    torch.complex(*state.double().unflatten(1, (-1, 2, half)).unbind(2))
                    for state in at(document, layer, before, after)
                )
                expected = plain * torch.polar(torch.ones_like(angles), angles)
                assert (
                    relative_error(torch.view_as_real(rotated).flatten(1), torch.view_as_real(expected).flatten(1))
                    < 1e-5
                )


def test_only_the_sites_asked_for(tiny_folders: dict[Tiny, Path]) -> None:
    one = Batch(BATCH.input_ids[:1], BATCH.lengths[:1])
    (document,) = transformers_sites(tiny_folders[TINY[1]], one, torch.bfloat16, sites=("z", "embed"))
    assert [str(point) for point in by_depth(document, 3)] == ["embed", "z@0", "z@1", "z@2"]
    assert {state.dtype for state in document.values()} == {torch.bfloat16}
    assert {point.site for point in document} < set(SITES)
