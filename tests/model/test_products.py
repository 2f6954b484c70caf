"""The arithmetic of local layers against numpy in double precision."""

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.model import products
from nemo_qwen_hidden.plan.footprint import MLP_ROWS

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(found: torch.Tensor, expected: np.ndarray) -> float:
    """Of the whole, relative."""
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.fixture(params=[True, False], ids=["widened", "native"])
def _working(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without and with units for half precision."""
    monkeypatch.setattr(products, "working_dtype", lambda dtype: torch.float32 if request.param else dtype)


@pytest.mark.usefixtures("_working")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [1, MLP_ROWS, 2 * MLP_ROWS + 3])
@pytest.mark.parametrize("bias", [True, False])
def test_multiply(dtype: torch.dtype, rows: int, bias: bool) -> None:
    inputs, weight = drawn(rows, 40, dtype=dtype, seed=1), drawn(24, 40, dtype=dtype, seed=2)
    added = drawn(24, dtype=dtype, seed=3) if bias else None
    with torch.no_grad():
        found = products.multiply(inputs, weight, added)
        turned = products.multiply(inputs.t().contiguous().t(), weight, added)
    expected = inputs.double().numpy() @ weight.double().numpy().T + (0 if added is None else added.double().numpy())
    assert found.dtype == dtype and distance(found, expected) < ROUNDING[dtype]
    assert distance(turned, expected) < ROUNDING[dtype]


@pytest.mark.usefixtures("_working")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [1, MLP_ROWS, 2 * MLP_ROWS + 3])
def test_swiglu(dtype: torch.dtype, rows: int) -> None:
    inputs, weight = drawn(rows, 40, dtype=dtype, seed=1), drawn(24, 40, dtype=dtype, seed=2)
    with torch.no_grad():
        parts = [(where, act.clone()) for where, act in products.swiglu(inputs, weight)]
    assert [index for where, _ in parts for index in range(rows)[where]] == list(range(rows))
    gate, up = np.split(inputs.double().numpy() @ weight.double().numpy().T, 2, axis=1)
    found = torch.cat([act for _, act in parts])
    # gate and up are rounded, too, where half precision is native
    assert found.dtype == dtype and distance(found, gate / (1 + np.exp(-gate)) * up) < 3 * ROUNDING[dtype]


def test_half_precision_is_widened_where_torch_has_no_kernel_for_it() -> None:
    for dtype, supported in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    ):
        assert products.working_dtype(dtype) == (dtype if supported else torch.float32)
    assert products.working_dtype(torch.float32) == torch.float32
