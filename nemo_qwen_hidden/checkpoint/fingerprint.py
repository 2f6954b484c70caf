"""Which weights a folder holds: one hash, the same however they are divided into files, or written by NeMo."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.checkpoint.opened import Weights
from nemo_qwen_hidden.checkpoint.tensors import FINAL_NORM, OUTPUT, Raw


def weights_sha256(weights: Weights) -> str:
    """sha256, in hexadecimal, over names, dtypes, shapes and bytes of all tensors but the output layer, which no hidden
    state depends on. Reads every byte, with all cores that this process may use."""
    names = sorted(name for name in weights.names if name != OUTPUT)
    total, raw = hashlib.sha256(), weights.raw()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, digest in zip(names, pool.map(lambda name: _digest(raw(name)), names), strict=True):
            total.update(name.encode() + b"\0" + digest)
    return total.hexdigest()


def final_norm_weight(weights: Weights) -> NDArray[np.float32]:
    """[hidden], the weight of the final norm in fp32, which holds every value that a file can have."""
    raw = weights.raw()(FINAL_NORM)
    if raw.dtype == "BF16":
        return (np.frombuffer(raw.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw.data, {"F32": "<f4", "F16": "<f2"}[raw.dtype]).astype(np.float32)


def _digest(raw: Raw) -> bytes:
    digest = hashlib.sha256(json.dumps([raw.dtype, raw.shape]).encode())
    digest.update(raw.data)
    return digest.digest()
