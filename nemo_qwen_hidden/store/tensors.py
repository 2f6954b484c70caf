"""Stored dtypes as torch has them. Legend: n states of one call, H numbers in each."""

import torch

from nemo_qwen_hidden.store.format import Dtype

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def read_dtype(dtype: Dtype) -> torch.dtype:
    """What values of a stored dtype are read as: float32 where rows have a scale, else the same."""
    return torch.float32 if dtype.scaled else TORCH_DTYPES[dtype.name]


def first_not_finite(values_nH: torch.Tensor) -> int | None:
    """Index along n of the first row with an infinite value or NaN, or None."""
    if not values_nH.numel() or all(torch.isfinite(end) for end in torch.aminmax(values_nH)):
        return None
    return int((~torch.isfinite(values_nH)).any(dim=1).nonzero()[0])


def first_overflow(values_nH: torch.Tensor, stored_nH: torch.Tensor) -> int | None:
    """Index along n of the first row in which a finite value became infinite by the cast, or None."""
    if torch.finfo(values_nH.dtype).max <= torch.finfo(stored_nH.dtype).max:
        return None
    if not stored_nH.numel() or all(torch.isfinite(end) for end in torch.aminmax(stored_nH)):
        return None  # the usual case, at a tenth of the price
    rows = (torch.isinf(stored_nH) & torch.isfinite(values_nH)).any(dim=1).nonzero()
    return int(rows[0]) if len(rows) else None


def row_bytes(stored_nH: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor of at least one element, without a copy."""
    return stored_nH.view(torch.uint8).numpy().data.cast("B")
