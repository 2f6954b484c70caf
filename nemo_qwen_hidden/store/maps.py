"""Files of a store as read-only arrays in memory maps: nothing is read before it is indexed."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.store.files import open_inside
from nemo_qwen_hidden.store.format import DTYPES
from nemo_qwen_hidden.store.header import Header, read_header

# BF16, which numpy lacks, stands as integers of its bits
_NUMPY = {dtype.safetensors: dtype.container for dtype in DTYPES.values()} | {
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


def map_tensors(folder: Path, name: str) -> tuple[Header, dict[str, NDArray[Any]]]:
    """The header and the tensors of safetensors file ``name`` of a store.

    Raises:
        StoreError: the file is absent, truncated, or not what its header says; names the file.
    """
    with os.fdopen(open_inside(folder, name), "rb") as file:
        header = read_header(file.fileno(), str(folder / name))
        tensors = {
            tensor: _map(file, _NUMPY[spec.dtype], header.offsets[tensor], spec.shape)
            for tensor, spec in header.tensors.items()
        }
    return header, tensors


def map_bytes(folder: Path, name: str) -> NDArray[np.uint8]:
    """The bytes of file ``name`` of a store.

    Raises:
        StoreError: the file is absent or cannot be read.
    """
    with os.fdopen(open_inside(folder, name), "rb") as file:
        return _map(file, np.dtype("u1"), 0, (os.fstat(file.fileno()).st_size,))


def _map(file: BinaryIO, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
    if 0 in shape:  # a memory map of no bytes is an error
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(file, dtype, "r", offset, shape))
