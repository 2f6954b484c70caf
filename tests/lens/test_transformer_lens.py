"""Every site equals TransformerLens' hook of that name, on the same weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, LAYERLESS_SITES, SITES, HookPoint
from nemo_qwen_hidden.topology import Topology
from tests.support import lens
from tests.support.hf_sites import transformers_sites
from tests.support.models import TINY, ragged_batch, relative_error
from tests.support.ranks import gathered

pytestmark = pytest.mark.skipif(
    find_spec("transformer_lens") is None, reason="TransformerLens is not installed: pip install '.[lens]'"
)
BATCH = ragged_batch((17, 1, 29))
TOLERANCE = 1e-5
MODELS = (*TINY, "embedded")
LAYOUTS = (Topology(), Topology(pp=2, cp=2))
EVERYTHING = tuple(site if site in LAYERLESS_SITES else f"{site}@:" for site in SITES)

Documents = list[dict[HookPoint, torch.Tensor]]


def folder_of(model: Any, tiny_folders: dict[Any, Path]) -> Path:
    return demo.model_folder() if model == "embedded" else tiny_folders[model]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: getattr(model, "name", model))
def model(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def all_theirs(tiny_folders: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Documents]]:
    """Of ``lens.bridge`` and ``lens.hooked``, for each model."""
    from nemo_qwen_hidden.parallel.launch import run_ranks

    log = tmp_path_factory.mktemp("theirs") / "ranks.log"
    folders = [folder_of(model, tiny_folders) for model in MODELS]
    (found,) = run_ranks(lens.of_folders, (folders, BATCH), world=1, log=log)
    return [
        {
            model: [{point: torch.from_numpy(state) for point, state in each.items()} for each in of_model]
            for model, of_model in zip(MODELS, models, strict=True)
        }
        for models in found
    ]


@pytest.fixture(scope="module", params=[0, 1], ids=["bridge", "hooked"])
def theirs(request: pytest.FixtureRequest, model: Any, all_theirs: list[dict[Any, Documents]]) -> Documents:
    return all_theirs[request.param][model]


@pytest.fixture(scope="module")
def ours(tiny_folders: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Documents]]:
    """For each model, ``hidden_states`` in each layout."""
    from nemo_qwen_hidden.parallel.launch import run_ranks

    log = tmp_path_factory.mktemp("lens") / "ranks.log"
    folders, options = [folder_of(model, tiny_folders) for model in MODELS], ({"hook_points": EVERYTHING},)
    found = [
        run_ranks(gathered, (layout, folders, BATCH, options), world=layout.world, log=log)[0] for layout in LAYOUTS
    ]
    return {model: [documents(of_layout[n][0]) for of_layout in found] for n, model in enumerate(MODELS)}


def documents(states: dict[HookPoint, Any]) -> Documents:
    """[batch, tokens, *shape] as documents without padding, in the shapes of ``hf_sites.transformers_sites``."""
    return [
        {point: without_padding(point, torch.from_numpy(state[row]), length) for point, state in states.items()}
        for row, length in enumerate(BATCH.lengths)
    ]


def without_padding(point: HookPoint, state: torch.Tensor, length: int) -> torch.Tensor:
    return state[:length, :, :length] if point.site == ATTN_WEIGHTS else state[:length].flatten(1)


def assert_equal(states: Documents, theirs: Documents) -> None:
    for ours, expected in zip(states, theirs, strict=True):
        assert set(ours) == set(expected)
        worst = {str(point): relative_error(ours[point], expected[point]) for point in expected}
        assert {point: error for point, error in worst.items() if not error < TOLERANCE} == {}


def test_transformers(model: Any, tiny_folders: dict[Any, Path], theirs: Documents) -> None:
    assert_equal(transformers_sites(folder_of(model, tiny_folders), BATCH), theirs)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_hidden_states(model: Any, ours: dict[Any, list[Documents]], theirs: Documents, layout: int) -> None:
    assert_equal(ours[model][layout], theirs)
