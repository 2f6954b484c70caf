"""What is done to states on the way out."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.read.reader import open_store
from tests.store.crafted import EPS, PARTS, POINTS, Crafted, craft

POINT, FINAL = POINTS[2:]


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16", "int8"])
def crafted(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Crafted:
    return craft(tmp_path_factory.mktemp("fixed") / "store", parts=PARTS, dtype=request.param)


def test_casts(crafted: Crafted) -> None:
    view = open_store(crafted.path)[POINT]
    values = crafted.states[POINT]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert view.to(dtype).dtype == view.to(dtype)[3:9].dtype == dtype
        assert torch.equal(view.to(dtype)[3:9], values[3:9].to(dtype))
    assert torch.equal(view.float()[[1, 30]], values[[1, 30]].float())
    assert torch.equal(view.float()[-1], values[-1].float())
    for dtype in (torch.int8, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"states can be cast to a float type, but {dtype} is asked for"):
            view.to(dtype)


def test_numpy_where_it_has_the_dtype(crafted: Crafted) -> None:
    view = open_store(crafted.path)[POINT]
    if view.dtype == torch.bfloat16:
        with pytest.raises(TypeError, match=r"numpy has no bfloat16; use .float\(\), as in store\['resid_post@3'\]"):
            view.numpy(slice(3))
        view = view.float()
    assert np.array_equal(view.numpy([3, 30]), view[[3, 30]].numpy())
    assert view.numpy(4).shape == (6,)


def test_normed_is_the_final_norm(crafted: Crafted) -> None:
    store = open_store(crafted.path)
    for point in POINTS[:3]:
        values = crafted.states[point].double()
        truth = values / (values.square().mean(dim=1, keepdim=True) + EPS).sqrt() * crafted.weight.double()
        view = store[point].normed()
        assert (view.norm, view.dtype) == ("after", torch.float32) and store[point].norm == "before"
        torch.testing.assert_close(view[:].double(), truth, rtol=1e-5, atol=1e-6)
        assert torch.equal(view.to(torch.float16)[5], view[5].half())


def test_normed_is_refused_where_it_would_be_wrong(crafted: Crafted, tmp_path: Path) -> None:
    store = open_store(crafted.path)
    with pytest.raises(StoreError, match=r"`final_norm: normed\(\)` must be asked of states before .* but is 'output"):
        store[FINAL].normed()
    for view in (store[POINT].normed(), store[POINT].float().normed().to(torch.float64)):
        with pytest.raises(StoreError, match=r"must be asked of states as they were stored, but is '.normed\(\)'"):
            view.normed()
        with pytest.raises(StoreError, match=r"standardized\(\)` must be asked of states as they were stored"):
            view.standardized()
    with pytest.raises(StoreError, match=r"must be asked of states as they were stored, but is '.standardized\(\)'"):
        store[POINT].standardized().normed()
    other = open_store(craft(tmp_path / "s", points=[HookPoint("attn_out", 1), POINT], final_norm=False).path)
    with pytest.raises(
        StoreError,
        match=r"must be asked of the residual stream \(embed, resid_pre, resid_mid, resid_post\), but is 'attn",
    ):
        other["attn_out@1"].normed()
    with pytest.raises(StoreError, match="needs the weight of the model's final norm, which the store must hold"):
        other[POINT].normed()


def test_standardized(crafted: Crafted) -> None:
    values = crafted.states[POINT].double()
    truth = (values - values.mean(dim=0)) / values.var(dim=0, correction=0).mean().sqrt()
    view = open_store(crafted.path)[POINT].standardized()
    assert view.dtype == torch.float32
    torch.testing.assert_close(view[:].double(), truth, rtol=1e-4, atol=1e-5)
    assert torch.equal(view[[9, 2]], view[:][[9, 2]])


def test_rows_that_do_not_differ_cannot_be_standardized(tmp_path: Path) -> None:
    same = craft(tmp_path / "s", values=lambda rows, hidden_size: np.ones((rows, hidden_size)))
    none = craft(tmp_path / "t", values=lambda rows, hidden_size: np.full((rows, hidden_size), np.nan))
    for path, counted in ((same.path, 23), (none.path, 0)):
        with pytest.raises(StoreError, match=f"needs rows that differ from each other, but is '{counted} counted rows"):
            open_store(path)[POINT].standardized()[0]


def test_statistics_of_the_whole_store(crafted: Crafted) -> None:
    store = open_store(crafted.path)
    values = crafted.states[POINT].double()
    known = store[POINT].statistics()
    assert known is store.statistics(POINT) and known.rows == 34
    np.testing.assert_allclose(known.mean, values.mean(dim=0).numpy(), atol=1e-9)
    np.testing.assert_allclose(known.variance, values.var(dim=0, correction=0).numpy(), atol=1e-9)
    assert known.max_abs == values.abs().max()
    assert known.max_abs_state == int(values.abs().amax(dim=1).argmax())
    assert known.norms.sum() == 34


def test_error_of_the_whole_store(crafted: Crafted) -> None:
    error = open_store(crafted.path)[POINT].error()
    if crafted.manifest.stored_dtype == "fp32":
        assert error is None
    else:
        assert error is not None and (error.rows, error.units, error.max) == (34, 45, 0.009)


def test_views_are_of_one_store_and_can_be_pickled(crafted: Crafted) -> None:
    view = open_store(crafted.path)[POINT].float().normed().to(torch.float64)
    assert repr(view).endswith("before the final norm).to(torch.float32).normed().to(torch.float64)")
    again = pickle.loads(pickle.dumps(view))
    assert repr(again) == repr(view) and torch.equal(again[:], view[:])


def test_what_is_read_owns_its_memory(crafted: Crafted) -> None:
    store = open_store(crafted.path)
    for view in (store[POINT], store[POINT].float(), store[POINT].to(store.dtype)):
        truth = view[:].clone()
        for rows in (4, slice(2, 9), [1, 7]):
            view[rows].fill_(7)
            assert torch.equal(view[:], truth)
