"""The tensors of a folder: which file holds each, its shape, and reading a slice of it."""

import json
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_qwen_hidden.checkpoint.distributed import DTYPES
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError
from nemo_qwen_hidden.plan.footprint import DecoderShape

if TYPE_CHECKING:
    import torch

EMBEDDING, FINAL_NORM, OUTPUT = "embed_tokens.weight", "norm.weight", "lm_head.weight"
SCORE = "score.weight"
"""A sequence classifier's in place of the output layer."""
FLOATS = ("F32", "BF16", "F16")
_PREFIX = "model."
_LENGTH_BYTES = 8
_DERIVED = "rotary_emb.inv_freq"  # saved by old releases of transformers, computed by everyone


def expected_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Names (without ``model.``) and shapes of a Qwen2 decoder's tensors, the output layer apart."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query, key = shape.num_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, hidden), FINAL_NORM: (hidden,)}
    for layer in range(shape.num_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.o_proj.weight": (hidden, query),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
        for name, rows in (("q", query), ("k", key), ("v", key)):
            of_layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
            of_layer[f"self_attn.{name}_proj.bias"] = (rows,)
        expected |= {f"layers.{layer}.{name}": size for name, size in of_layer.items()}
    return expected


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A tensor as a safetensors file holds it: dtype by that format's names, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, tensor: "torch.Tensor") -> "Raw":
        """Shares the memory of a contiguous tensor."""
        import torch

        whole = tensor.contiguous()
        data = whole.view(torch.uint8).numpy().data.cast("B")
        return cls(dtype=DTYPES[str(whole.dtype).removeprefix("torch.")], shape=tuple(whole.shape), data=data)

    def tensor(self) -> "torch.Tensor":
        """A copy."""
        import torch

        dtype = {safetensors: name for name, safetensors in DTYPES.items()}[self.dtype]
        return torch.frombuffer(bytearray(self.data), dtype=getattr(torch, dtype)).reshape(self.shape)


@dataclass(frozen=True)
class TensorFiles:
    """An index of one or several safetensors files, by tensor name without ``model.``."""

    folder: Path
    files: Mapping[str, str]
    prefix: str

    @classmethod
    def of(cls, folder: Path) -> "TensorFiles":
        """Finds ``model.safetensors``, or the files named by ``model.safetensors.index.json``.

        Raises:
            CheckpointError: neither is there, or the index names a file that is not.
        """
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file():  # first, as in transformers: an index beside it is what an earlier save left
            with _open_numpy(single) as handle:
                files = dict.fromkeys(handle.keys(), single.name)
        elif index.is_file():
            files = _read_index(index)
        else:
            raise CheckpointError(
                "model.path", "must hold model.safetensors or model.safetensors.index.json", str(folder)
            )
        for name in sorted(set(files.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError("model.path", f"must hold `{name}`, which its index names", str(folder))
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in files) else ""
        return cls(
            folder=folder, files={name.removeprefix(prefix): file for name, file in files.items()}, prefix=prefix
        )

    def full_name(self, name: str) -> str:
        """The name that the files use."""
        return name if name in (OUTPUT, SCORE) else self.prefix + name

    def check(self, shape: DecoderShape) -> None:
        """Compares names, shapes and dtypes with what a Qwen2 of this shape has; reads headers only.

        Raises:
            CheckpointError: a tensor is missing or has the wrong shape.
            UnsupportedModelError: a tensor that no Qwen2 has, or one that is not floating point.
        """
        expected = expected_shapes(shape)
        missing = [self.full_name(name) for name in expected if name not in self.files]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError("model.path", f"must hold the tensor `{missing[0]}`{more}", str(self.folder))
        for name in self.files:
            if name not in expected and name.startswith("layers.") and not name.endswith(_DERIVED):
                raise UnsupportedModelError(
                    "model.path", f"must be a Qwen2 and have no tensor `{self.full_name(name)}`", str(self.folder)
                )
        with ExitStack() as stack:
            handles = {
                file: stack.enter_context(_open_numpy(self.folder / file)) for file in {self.files[n] for n in expected}
            }
            for name, size in expected.items():
                self._check_one(name, size, handles[self.files[name]])

    def _check_one(self, name: str, size: tuple[int, ...], handle: Any) -> None:
        if self.full_name(name) not in handle.keys():  # noqa: SIM118 - not a dict
            raise CheckpointError(
                "model.path",
                f"must hold `{self.full_name(name)}` in `{self.files[name]}`, as its index says",
                str(self.folder),
            )
        found = handle.get_slice(self.full_name(name))
        if tuple(found.get_shape()) != size:
            raise CheckpointError(
                f"model.path: {self.full_name(name)}",
                f"must have shape {list(size)} by config.json",
                list(found.get_shape()),
            )
        if found.get_dtype() not in FLOATS:
            raise UnsupportedModelError(
                f"model.path: {self.full_name(name)}", f"must be one of {', '.join(FLOATS)}", found.get_dtype()
            )

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, without ``model.``."""
        return self.files.keys()

    def raw(self) -> Callable[[str], Raw]:
        """Maps the files, and gives the bytes of each tensor. Whether they are whole was checked with the index."""
        contents = {name: _mapped(self.folder / name) for name in sorted(set(self.files.values()))}

        def read(name: str) -> Raw:
            data, header = contents[self.files[name]]
            entry = header[self.full_name(name)]
            start, stop = entry["data_offsets"]
            return Raw(dtype=entry["dtype"], shape=tuple(entry["shape"]), data=data[start:stop])

        return read

    def reader(self) -> "TensorReader":
        """Opens the files for reading slices; a context manager."""
        return TensorReader(self)


class Reader(Protocol):
    """Reads parts of tensors by Hugging Face's names, without ``model.``."""

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> "torch.Tensor":
        """Rows (and columns, of a matrix) of a tensor."""

    def __contains__(self, name: str) -> bool: ...


class TensorReader:
    """Reads slices of tensors; each file is opened (mapped) once, on first use."""

    def __init__(self, tensors: TensorFiles) -> None:
        self._tensors, self._stack, self._handles = tensors, ExitStack(), dict[str, Any]()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()
        self._stack.close()

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> "torch.Tensor":
        """Rows (and columns, of a matrix) of a tensor, in the dtype of the file; reads only those."""
        from safetensors import safe_open

        file = self._tensors.files[name]
        if file not in self._handles:
            self._handles[file] = self._stack.enter_context(safe_open(self._tensors.folder / file, framework="pt"))
        lazy = self._handles[file].get_slice(self._tensors.full_name(name))
        part: torch.Tensor = lazy[rows] if columns is None else lazy[rows, columns]
        return part

    def __contains__(self, name: str) -> bool:
        return name in self._tensors.files

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.files)


def _read_index(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "model.path", f"must have an index with a `weight_map` of names to files ({error})", str(index)
        ) from None


def _mapped(path: Path) -> tuple[memoryview, dict[str, Any]]:
    """A file's data, and its header."""
    with open(path, "rb") as file:
        contents = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    length = int.from_bytes(contents[:_LENGTH_BYTES], "little")
    return contents[_LENGTH_BYTES + length :], json.loads(bytes(contents[_LENGTH_BYTES : _LENGTH_BYTES + length]))


def _open_numpy(file: Path) -> Any:
    """Opened for its header alone; numpy, because importing torch to say no costs over a second."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError("model.path", f"must hold whole safetensors files ({error})", str(file)) from None
