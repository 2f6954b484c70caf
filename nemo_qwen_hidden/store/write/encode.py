"""States on their way into a store: refused, cast, and what that cost.

Legend: n states of one call, H numbers in each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.format import Dtype
from nemo_qwen_hidden.store.tensors import TORCH_DTYPES, first_not_finite, first_overflow

INT8_MAX = 127


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """values: [n, H] in the stored dtype, contiguous. scale: fp32 [n] where the dtype is scaled. error: float64 [n],
    the relative error of each row (see ``statistics.StoredError``), None where the dtype holds every value."""

    values: torch.Tensor
    scale: torch.Tensor | None
    error: NDArray[np.float64] | None


def encode(values_nH: torch.Tensor, dtype: Dtype, *, nonfinite: str, row_at: Callable[[int], str]) -> Encoded:
    """``values_nH``, floats on the CPU, as they are stored.

    Args:
        nonfinite: ``refuse`` or ``keep`` infinite values and NaN. row_at: names the row at an index, for errors.

    Raises:
        StoreError: a value is not finite, and they are refused or ``dtype`` cannot hold them; or one is finite and too
            large for ``dtype``.
    """
    values_nH = values_nH.detach()
    broken = None if nonfinite == "keep" and not dtype.scaled else first_not_finite(values_nH)
    if broken is not None:
        keep = "" if dtype.scaled else "; precision.nonfinite=keep stores them as they are"
        rule = f"must give finite values; {row_at(broken)} has others (fp16 ends at 65504{keep})"
        raise StoreError("precision.compute", rule, str(values_nH.dtype).removeprefix("torch."))
    if dtype.scaled:
        return _to_int8(values_nH)
    stored = values_nH.to(TORCH_DTYPES[dtype.name]).contiguous()
    overflow = first_overflow(values_nH, stored)
    if overflow is not None:
        largest = float(values_nH[overflow].abs().nan_to_num(posinf=0.0).max())
        most = torch.finfo(stored.dtype).max
        rule = f"must hold every value, and at most {most:g} fits; {row_at(overflow)} has {largest:g}"
        raise StoreError("precision.stored", rule, dtype.name)
    lossless = torch.promote_types(values_nH.dtype, stored.dtype) == stored.dtype
    return Encoded(values=stored, scale=None, error=None if lossless else _errors(values_nH.float(), stored.float()))


def _to_int8(values_nH: torch.Tensor) -> Encoded:
    """Each row divided by its largest magnitude over 127, and rounded to the nearest even number."""
    values_nH = values_nH.float()
    scale = values_nH.abs().amax(dim=1) / INT8_MAX
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)[:, None]
    stored = (values_nH / divisor).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return Encoded(values=stored, scale=scale, error=_errors(values_nH, stored * scale[:, None]))


def _errors(computed_nH: torch.Tensor, stored_nH: torch.Tensor) -> NDArray[np.float64]:
    difference = torch.linalg.vector_norm(computed_nH - stored_nH, dim=1)
    relative = difference / torch.linalg.vector_norm(computed_nH, dim=1)
    errors: NDArray[np.float64] = relative.nan_to_num(nan=0.0, posinf=0.0).double().numpy()
    return errors
