"""Safetensors headers: built before there is data, so that any rank can write any row at its byte offset.

A file is 8 bytes (length of the header, little-endian), the header (JSON, padded with spaces), the data. See
https://github.com/huggingface/safetensors#format.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.fields import Fields, load_json

ALIGNMENT_BYTES = 64
MAX_HEADER_BYTES = 1 << 20
LENGTH_BYTES = 8
_MOST_AXES = 8
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """dtype: safetensors' name, e.g. ``BF16``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """tensors: by name. offsets: byte of the file at which each starts. size_bytes: of the whole file."""

    tensors: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    size_bytes: int


def build_header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The first bytes of a file with these tensors, one after the other in this order, and what they say.

    The same arguments give the same bytes on every rank. Data starts at a multiple of 64.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    relative, end = {}, 0
    for name, spec in tensors.items():
        relative[name], end = end, end + spec.bytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [relative[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + LENGTH_BYTES) % ALIGNMENT_BYTES)
    start = LENGTH_BYTES + len(text)
    offsets = {name: start + offset for name, offset in relative.items()}
    header = Header(tensors=dict(tensors), offsets=offsets, metadata=dict(metadata), size_bytes=start + end)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, header


def read_header(descriptor: int, file: str) -> Header:
    """The header of an open file, checked against the file's size.

    Raises:
        StoreError: what the header claims does not hold; names ``file``.
    """
    file_bytes = os.fstat(descriptor).st_size
    start = os.pread(descriptor, LENGTH_BYTES, 0)
    return parse_header(
        start + os.pread(descriptor, header_length(start, file_bytes, file), len(start)), file_bytes, file
    )


def header_length(start: bytes, file_bytes: int, file: str) -> int:
    """Bytes of the header after the first 8, from the start of a file; raises as ``read_header``."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise StoreError(file, "must start with the length of a safetensors header that fits into the file", length)
    return length


def parse_header(start: bytes, file_bytes: int, file: str) -> Header:
    """The header of a file of ``file_bytes`` that begins with ``start``, at least to the header's end; raises as
    ``read_header``."""
    length = header_length(start, file_bytes, file)
    entries = load_json(start[LENGTH_BYTES : LENGTH_BYTES + length], file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StoreError(f"{file}: __metadata__", "must map strings to strings", metadata)
    tensors, offsets, end = {}, {}, 0
    for name, entry in entries.items():
        tensors[name], relative = _parse_entry(Fields(entry, file=file, at=name))
        if relative != end:
            rule = f"must start at {end}, where the tensor before it ends"
            raise StoreError(f"{file}: {name}.data_offsets", rule, relative)
        offsets[name] = LENGTH_BYTES + length + relative
        end += tensors[name].bytes
    header = Header(tensors=tensors, offsets=offsets, metadata=metadata, size_bytes=LENGTH_BYTES + length + end)
    if header.size_bytes != file_bytes:
        raise StoreError(file, f"must be {header.size_bytes} bytes long, as its header says", file_bytes)
    return header


def _parse_entry(fields: Fields) -> tuple[TensorSpec, int]:
    """The tensor, and the first of its two offsets."""
    dtype = fields.choice("dtype", tuple(_ITEM_BYTES))
    shape, offsets = fields.integers("shape"), fields.integers("data_offsets")
    if len(shape) > _MOST_AXES:  # whose product could have any number of digits
        raise fields.error("shape", f"must have at most {_MOST_AXES} axes", list(shape))
    spec = TensorSpec(dtype=dtype, shape=shape)
    if len(offsets) != 2 or offsets[1] - offsets[0] != spec.bytes:
        raise fields.error("data_offsets", f"must enclose {spec.bytes} bytes, as dtype and shape say", list(offsets))
    if fields.rest():
        raise fields.error(next(iter(fields.rest())), "must not be there", fields.rest())
    return spec, offsets[0]
