"""Every site equals TransformerLens' hook of that name, on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.hookpoint import HookPoint
from tests.support import lens
from tests.support.hf_sites import transformers_sites
from tests.support.models import TINY, ragged_batch, relative_error

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: pip install '.[lens]'")

BATCH = ragged_batch((17, 1, 29))
TOLERANCE = 1e-5

Documents = list[dict[HookPoint, torch.Tensor]]


@pytest.fixture(scope="module", params=[*TINY, "embedded"], ids=lambda model: getattr(model, "name", model))
def folder(request: pytest.FixtureRequest, tiny_folders: dict[Any, Path]) -> Path:
    return demo.model_folder() if request.param == "embedded" else tiny_folders[request.param]


@pytest.fixture(scope="module", params=[lens.bridge, lens.hooked], ids=lambda load: load.__name__)
def theirs(request: pytest.FixtureRequest, folder: Path) -> Documents:
    return lens.lens_sites(request.param(folder), BATCH)


def assert_equal(states: Documents, theirs: Documents) -> None:
    for ours, expected in zip(states, theirs, strict=True):
        assert set(ours) == set(expected)
        worst = {point: relative_error(ours[point], expected[point]) for point in expected}
        assert {point: error for point, error in worst.items() if not error < TOLERANCE} == {}


def test_transformers(folder: Path, theirs: Documents) -> None:
    assert_equal(transformers_sites(folder, BATCH), theirs)
