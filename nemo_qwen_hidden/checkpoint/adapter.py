"""A LoRA adapter as NeMo's PEFT saves it: which linears it changes, and by how much.

LoRA (https://arxiv.org/abs/2106.09685): y = W x + alpha / dim * B (A x), with A [dim, in] and B [out, dim]; in NeMo
2.7.3 ``linear_in`` and ``linear_out`` (``nemo/collections/llm/peft/utils.py: ParallelLinearAdapter``).
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_qwen_hidden.checkpoint.distributed import DTYPES, WEIGHTS, DistributedFiles
from nemo_qwen_hidden.checkpoint.nemo_context import CONTEXT, MODEL, read_context
from nemo_qwen_hidden.checkpoint.opened import Weights
from nemo_qwen_hidden.checkpoint.qkv import projection
from nemo_qwen_hidden.checkpoint.tensors import FLOATS, Raw, Reader
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError
from nemo_qwen_hidden.plan.footprint import DecoderShape

if TYPE_CHECKING:
    import torch

SETTING = "model.adapter"
_LORA = ("nemo.collections.llm.peft.lora.LoRA", "nemo_qwen_hidden.training.lora.LoRA")
_HEADS = re.compile(r"(?:module\.)+state_heads\.")
_NAME = re.compile(
    r"(?:module\.)+decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<linear>[\w.]+)\.adapter\.linear_(?P<side>in|out)\.weight"
)
_OF_LINEAR: Mapping[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
_LINEAR_OF = {name: linear for linear, names in _OF_LINEAR.items() for name in names}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of a decoder of this shape.

    pairs: names of the two matrices, A and B, by (layer, linear in Megatron's name). scale: alpha / dim.
    """

    folder: Path
    stored: DistributedFiles
    shape: DecoderShape
    dim: int
    alpha: float
    pairs: Mapping[tuple[int, str], tuple["_Matrix", "_Matrix"]]

    @classmethod
    def of(cls, path: str | Path, shape: DecoderShape, setting: str = SETTING) -> "Adapter":
        """Reads the adapter's context and the list of its tensors, and compares them with the model's sizes.

        Args:
            setting: what named the folder, for errors.

        Raises:
            CheckpointError: no such folder, or something of it is missing or does not fit the model.
            UnsupportedModelError: not a LoRA of the four linears of a Qwen2's layers.
        """
        folder = Path(path).expanduser()
        if not (folder / WEIGHTS).is_dir():
            rule = f"must be a folder with `{WEIGHTS}/` and `{CONTEXT}/`, as NeMo saves an adapter"
            raise CheckpointError(setting, rule, str(path))
        transform = read_context(folder, setting).get("model_transform")
        target = transform.get("_target_") if isinstance(transform, dict) else transform
        if not isinstance(transform, dict) or target not in _LORA:
            rule = "must be NeMo's LoRA (`llm.peft.LoRA`)"
            raise UnsupportedModelError(f"{setting}: {CONTEXT}/{MODEL}: model_transform", rule, target)
        dim, alpha = (_number(transform, field, setting) for field in ("dim", "alpha"))
        stored = DistributedFiles.of(folder / WEIGHTS, setting)
        return cls(folder, stored, shape, int(dim), alpha, _pairs(stored, shape, int(dim)))

    @cached_property
    def sha256(self) -> str:
        """In hexadecimal, over the scale, and the names, shapes, dtypes and bytes of all matrices; the same whatever
        layout they were written in."""
        import torch

        total = hashlib.sha256(json.dumps([self.dim, self.alpha]).encode())
        for (layer, linear), matrices in sorted(self.pairs.items()):
            for matrix in matrices:
                tensor = matrix.read(self.stored).contiguous()
                about = [layer, linear, DTYPES[str(tensor.dtype).removeprefix("torch.")], *tensor.shape]
                total.update(json.dumps(about).encode())
                total.update(tensor.view(torch.uint8).numpy().data.cast("B"))
        return total.hexdigest()

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.pairs

    def change(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> "torch.Tensor":
        """What is added to rows (and columns) of a tensor, by Hugging Face's name of it, computed in fp32."""
        key = self._key(name)
        down, up = (matrix.read(self.stored).float() for matrix in self.pairs[key])
        if key[1] == "mlp.linear_fc1":
            up = up.chunk(2)["up_proj" in name]
        elif key[1] == "self_attention.linear_qkv":
            up = projection(up, self.shape, name.split(".")[3][0])
        return (up[rows] @ down[:, columns or slice(None)]).mul_(self.alpha / self.dim)

    def linears(self, layer: int) -> tuple[str, ...]:
        """The linears of a layer that it changes, by Megatron's names."""
        return tuple(linear for each, linear in self.pairs if each == layer)

    @staticmethod
    def _key(name: str) -> tuple[int, str]:
        """(layer, linear), (-1, "") of a tensor that is no linear's weight."""
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        if match is None or match[2] not in _LINEAR_OF:
            return -1, ""
        return int(match[1]), _LINEAR_OF[match[2]]


@dataclass(frozen=True)
class _Matrix:
    """A matrix of one layer; layer is None where it is not one of a stack of all layers'."""

    name: str
    layer: int | None

    def read(self, stored: DistributedFiles) -> "torch.Tensor":
        if self.layer is None:
            return stored.read(self.name)
        return stored.read(self.name, slice(self.layer, self.layer + 1))[0]


class MergedReader:
    """A reader of tensors to which an adapter's changes are added, in fp32."""

    def __init__(self, reader: Reader, adapter: Adapter) -> None:
        self._reader, self._adapter = reader, adapter

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> "torch.Tensor":
        """Rows (and columns, of a matrix) of a tensor: in fp32 where it is changed, else in the dtype of the file."""
        part = self._reader.read(name, rows, columns)
        return part.float().add_(self._adapter.change(name, rows, columns)) if name in self._adapter else part

    def __contains__(self, name: str) -> bool:
        return name in self._reader


class MergedWeights:
    """The tensors of a folder with an adapter merged in: added in fp32, and rounded once to the dtype of the file."""

    def __init__(self, weights: Weights, adapter: Adapter) -> None:
        self._weights, self._adapter = weights, adapter

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._weights.names

    def raw(self) -> Callable[[str], Raw]:
        """Gives the bytes of each tensor, as a safetensors file would hold them."""
        plain = self._weights.raw()

        def read(name: str) -> Raw:
            found = plain(name)
            if name not in self._adapter:
                return found
            weight = found.tensor()
            return Raw.of(weight.float().add_(self._adapter.change(name)).to(weight.dtype))

        return read


class ChangesReader:
    """A reader of the changes alone; no other tensor can be read of it."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> "torch.Tensor":
        """What is added to rows (and columns, of a matrix) of a tensor, in fp32."""
        return self._adapter.change(name, rows, columns)

    def __contains__(self, name: str) -> bool:
        return name in self._adapter


def _pairs(stored: DistributedFiles, shape: DecoderShape, dim: int) -> dict[tuple[int, str], tuple[_Matrix, _Matrix]]:
    found: dict[tuple[int, str], dict[str, _Matrix]] = {}
    for name, linear, side, layer in _matrices(stored):
        tensor = stored.tensors[name]
        stacked = layer is None
        wanted = _sizes(shape, linear, dim)[side]
        expected = (shape.num_layers, *wanted) if stacked else wanted
        if tensor.shape != expected:
            rule = f"must have shape {list(expected)}, as the model and the adapter's `dim` make it"
            raise CheckpointError(f"{stored.setting}: {name}", rule, list(tensor.shape))
        if tensor.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{stored.setting}: {name}", f"must be one of {', '.join(FLOATS)}", tensor.dtype
            )
        layers = sorted({chunk.offsets[0] for chunk in tensor.chunks}) if layer is None else [layer]
        for each in layers:
            found.setdefault((each, linear), {})[side] = _Matrix(name, each if stacked else None)
    if not found:
        raise CheckpointError(stored.setting, "must hold the matrices of a LoRA", str(stored.folder.parent))
    for (layer, linear), sides in found.items():
        if len(sides) != 2 or layer >= shape.num_layers:
            rule = f"must hold `linear_in` and `linear_out` for `{linear}` of layers below {shape.num_layers}"
            raise CheckpointError(stored.setting, rule, f"{', '.join(sides)} of layer {layer}")
    return {key: (sides["in"], sides["out"]) for key, sides in found.items()}


def _matrices(stored: DistributedFiles) -> Iterator[tuple[str, str, str, int | None]]:
    """(name, linear, in or out, layer where each has names of its own)."""
    for name in stored.tensors:
        if name.startswith("optimizer.") or _HEADS.match(name):
            continue
        match = _NAME.fullmatch(name)
        if match is None or match["linear"] not in _OF_LINEAR:
            rule = f"must be a LoRA of {', '.join(_OF_LINEAR)} alone, and have no tensor `{name}`"
            raise UnsupportedModelError(stored.setting, rule, str(stored.folder.parent))
        yield name, match["linear"], match["side"], None if match["layer"] is None else int(match["layer"])


def _sizes(shape: DecoderShape, linear: str, dim: int) -> dict[str, tuple[int, int]]:
    hidden, ffn, query = shape.hidden_size, shape.ffn_hidden_size, shape.num_heads * shape.head_dim
    inner, outer = {
        "self_attention.linear_qkv": (hidden, query + 2 * shape.num_query_groups * shape.head_dim),
        "self_attention.linear_proj": (query, hidden),
        "mlp.linear_fc1": (hidden, 2 * ffn),
        "mlp.linear_fc2": (ffn, hidden),
    }[linear]
    return {"in": (dim, inner), "out": (outer, dim)}


def _number(transform: Mapping[str, Any], field: str, setting: str) -> float:
    value = transform.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        place = f"{setting}: {CONTEXT}/{MODEL}: model_transform: {field}"
        raise CheckpointError(place, "must be a number above 0", value)
    return value
