"""How far apart two states may be that are the same but for rounding. R: rows, W: width.

Errors are relative to a row: |found - expected| / |expected|, Euclidean norms over the width. Rounding to a dtype moves
a value by at most its unit roundoff u times its magnitude, and so a row by at most u times its norm.
"""

from math import sqrt

import torch
from torch import Tensor

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What is tolerated of a row at least: 84 u of fp32, where a fault makes thousands.
FP32_ERROR = 5.0e-6
# What is tolerated beyond, as a multiple of what rounding does to this model on these tokens, as measured.
NOISE_MULTIPLE = 3.0
_INT8_STEPS = 127
_FLOOR = 1e-6
_SMALLEST_FP16 = 2.0**-24


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """fp32 [R]; infinite where a value is not finite on one side alone, zero where a row is expected to be NaN (which
    says: anything)."""
    free = expected.isnan().all(dim=1)
    norms: Tensor = expected.norm(dim=1)
    floor = _FLOOR * float(norms[~free].median()) if bool((~free).any()) else 0.0
    errors: Tensor = (found - expected).norm(dim=1) / norms.clamp_min(max(floor, torch.finfo(torch.float32).tiny))
    return torch.where(free, 0.0, torch.where(errors.isnan(), torch.inf, errors))


def stored_errors(values: Tensor, dtype: str) -> Tensor:
    """fp32 [R]: the most that storing ``values`` [R, W] in ``dtype`` can have moved each row, relative to its norm."""
    norms = values.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    if dtype == "int8":
        largest: Tensor = values.abs().amax(dim=1)
        of_norm: Tensor = largest / norms
        return of_norm * (sqrt(values.shape[1]) / (2 * _INT8_STEPS))
    absolute = _SMALLEST_FP16 / 2 * sqrt(values.shape[1]) / norms if dtype == "fp16" else torch.zeros_like(norms)
    return UNIT_ROUNDOFF[dtype] + absolute


def value_bounds(values: Tensor, dtype: str) -> Tensor:
    """[R, W]: the most that rounding to ``dtype`` can have moved each value."""
    if dtype == "int8":
        return (values.abs().amax(dim=1, keepdim=True) / (2 * _INT8_STEPS)).expand_as(values)
    absolute = _SMALLEST_FP16 / 2 if dtype == "fp16" else 0.0
    return values.abs() * UNIT_ROUNDOFF[dtype] + absolute


def fits(values: Tensor, dtype: str) -> bool:
    """Whether every value is one that ``dtype`` can hold exactly."""
    return bool((values.to(TORCH_DTYPES[dtype]).float() == values).all())
