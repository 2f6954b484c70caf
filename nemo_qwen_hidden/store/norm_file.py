"""The weight of the model's final norm, beside the states, so that a state taken before it can be had after it."""

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.store.header import TensorSpec, build_header

WEIGHT, EPSILON = "weight", "eps"


def norm_file(weight_H: NDArray[np.float32], epsilon: float) -> bytes:
    """A safetensors file with ``weight`` fp32 [H], and the norm's epsilon among its metadata.

    The norm is ``x / sqrt(mean(x**2) + eps) * weight``.
    """
    start, _ = build_header({WEIGHT: TensorSpec(dtype="F32", shape=weight_H.shape)}, {EPSILON: repr(epsilon)})
    return start + np.ascontiguousarray(weight_H, "<f4").tobytes()
