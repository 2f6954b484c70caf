"""Safetensors headers: ours are read by the library, and what does not hold is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.header import Header, TensorSpec, build_header, read_header

SPECS = {"a@1": TensorSpec(dtype="BF16", shape=(3, 5)), "b": TensorSpec(dtype="I64", shape=(0,))}


def read(path: Path) -> Header:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, path.name)
    finally:
        os.close(descriptor)


def put(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_is_built_is_read_back_and_aligned(tmp_path: Path) -> None:
    start, header = build_header(SPECS, {"rows": "3"})
    path = tmp_path / "f.safetensors"
    path.write_bytes(start + bytes(30))
    assert len(start) % 64 == 0 and header.offsets["a@1"] == len(start)
    assert header.size_bytes == len(start) + 30
    assert read(path) == header
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"rows": "3"}
        assert file.get_tensor("a@1").dtype == torch.bfloat16
        assert file.get_tensor("a@1").shape == (3, 5)
        assert file.get_tensor("b").shape == (0,)


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"x": torch.ones(4, 2)}, path)
    header = read(path)
    assert header.tensors == {"x": TensorSpec(dtype="F32", shape=(4, 2))}
    assert header.offsets["x"] == path.stat().st_size - 32


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "must start with the length of a safetensors header"),
        (b"{]", b"", "must hold JSON in UTF-8"),
        (b"\xff\xff", b"", "must hold JSON in UTF-8"),
        (b"[" * 100_000, b"", "must hold JSON in UTF-8"),
        (b"[1]", b"", "must hold a JSON object"),
        (b'{"x": {}, "x": {}}', b"", "a key stands twice"),
        (b'{"x": NaN}', b"", "NaN is not JSON"),
        ({"x": 3}, b"", "`f: x` must be an object, but is 3"),
        (
            {"x": {**GOOD, "dtype": "U8"}},
            bytes(8),
            "`f: x.dtype` must be one of F32, BF16, F16, I8, I32, I64, but is 'U8'",
        ),
        ({"x": {**GOOD, "shape": [-2]}}, bytes(8), "`f: x.shape` must be a list of integers"),
        ({"x": {**GOOD, "shape": [True]}}, bytes(8), "`f: x.shape` must be a list of integers"),
        ({"x": {**GOOD, "shape": [3]}}, bytes(8), "`f: x.data_offsets` must enclose 12 bytes"),
        ({"x": {**GOOD, "data_offsets": [8, 16]}}, bytes(16), "must start at 0"),
        ({"x": {**GOOD, "data_offsets": [0, 8, 8]}}, bytes(8), "must enclose 8 bytes"),
        ({"x": {**GOOD, "more": 1}}, bytes(8), "`f: x.more` must not be there"),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "`f: x.data_offsets` must be there, but is 'missing'"),
        ({"x": GOOD}, bytes(7), "bytes long, as its header says"),
        ({"x": GOOD}, bytes(9), "bytes long, as its header says"),
        ({"x": GOOD, "y": GOOD}, bytes(8), "must start at 8"),
        ({"__metadata__": {"a": 1}, "x": GOOD}, bytes(8), "must map strings to strings"),
        ({"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, bytes(8), "must enclose"),
    ],
)
def test_what_does_not_hold_is_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    with pytest.raises(StoreError) as caught:
        read(put(tmp_path / "f", header, data))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("start", [b"", b"\x02\0\0", (1 << 20 | 1).to_bytes(8, "little"), b"\xff" * 8])
def test_a_length_that_does_not_fit_is_refused(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "f").write_bytes(start)
    with pytest.raises(StoreError, match="must start with the length"):
        read(tmp_path / "f")
