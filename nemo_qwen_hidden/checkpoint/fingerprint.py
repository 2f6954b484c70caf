"""Which weights a folder holds: one hash, the same however they are divided into files."""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.checkpoint.tensors import FINAL_NORM, OUTPUT, TensorFiles

_LENGTH_BYTES = 8
_File = tuple[memoryview, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Raw:
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def weights_sha256(tensors: TensorFiles) -> str:
    """sha256, in hexadecimal, over names, dtypes, shapes and bytes of all tensors but the output layer, which no hidden
    state depends on. Reads every byte, with all cores that this process may use."""
    names = sorted(name for name in tensors.files if name != OUTPUT)
    total = hashlib.sha256()
    files = _files(tensors)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        raws = (_raw(files[tensors.files[name]], tensors.full_name(name)) for name in names)
        for name, digest in zip(names, pool.map(_digest, raws), strict=True):
            total.update(name.encode() + b"\0" + digest)
    return total.hexdigest()


def final_norm_weight(tensors: TensorFiles) -> NDArray[np.float32]:
    """[hidden], the weight of the final norm in fp32, which holds every value that a file can have."""
    raw = _raw(_files(tensors)[tensors.files[FINAL_NORM]], tensors.full_name(FINAL_NORM))
    if raw.dtype == "BF16":
        return (np.frombuffer(raw.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw.data, {"F32": "<f4", "F16": "<f2"}[raw.dtype]).astype(np.float32)


def _digest(raw: _Raw) -> bytes:
    digest = hashlib.sha256(json.dumps([raw.dtype, raw.shape]).encode())
    digest.update(raw.data)
    return digest.digest()


def _files(tensors: TensorFiles) -> dict[str, _File]:
    """Each file's data, mapped, and header. Whether they are whole was checked when the index was made."""
    files = {}
    for name in sorted(set(tensors.files.values())):
        with open(tensors.folder / name, "rb") as file:
            contents = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        length = int.from_bytes(contents[:_LENGTH_BYTES], "little")
        header = json.loads(bytes(contents[_LENGTH_BYTES : _LENGTH_BYTES + length]))
        files[name] = (contents[_LENGTH_BYTES + length :], header)
    return files


def _raw(file: _File, name: str) -> _Raw:
    data, header = file
    entry = header[name]
    start, stop = entry["data_offsets"]
    return _Raw(dtype=entry["dtype"], shape=tuple(entry["shape"]), data=data[start:stop])
