"""The tensors of a NeMo checkpoint under Hugging Face's names.

Megatron stacks what all layers have (``[layers, ...]``; by option it names each layer instead), keeps query, key and
value of a query group together (``[q of group g, k_g, v_g]``), gate before up, and pads the vocabulary. On disk norms
have Transformer Engine's names, whatever wrote them (``sharded_state_dict_keys_map`` of Megatron's local layers).
"""

import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_qwen_hidden.checkpoint.distributed import WEIGHTS, DistributedFiles, Stored
from nemo_qwen_hidden.checkpoint.nemo_context import CONTEXT, MODEL
from nemo_qwen_hidden.checkpoint.qkv import projection
from nemo_qwen_hidden.checkpoint.tensors import EMBEDDING, FINAL_NORM, FLOATS, OUTPUT, Raw, expected_shapes
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError
from nemo_qwen_hidden.plan.footprint import DecoderShape

if TYPE_CHECKING:
    import torch

_LAYERS, _FINAL_NORM = "decoder.layers.", "decoder.final_layernorm.weight"
_TABLE = re.compile(r"((?:module\.)+)embedding\.word_embeddings\.weight")
_TABLES = {EMBEDDING: "embedding.word_embeddings.weight", OUTPUT: "output_layer.weight"}
_OF_LAYER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_QKV, _GATE_UP = "self_attention.linear_qkv.", "mlp.linear_fc1.weight"
_HALVES = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a tensor is in the files: the name there, of a stack of all layers' which, rows of it, and of a fused
    projection ``q``, ``k`` or ``v``."""

    name: str
    layer: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    projection: str | None = None


@dataclass(frozen=True)
class NemoTensors:
    """The tensors of a NeMo checkpoint of this shape."""

    folder: Path
    stored: DistributedFiles
    shape: DecoderShape

    @classmethod
    def of(cls, folder: Path, shape: DecoderShape) -> "NemoTensors":
        """Raises as ``DistributedFiles.of`` does."""
        return cls(folder=folder, stored=DistributedFiles.of(folder / WEIGHTS, "model.path"), shape=shape)

    @cached_property
    def prefix(self) -> str:
        """What all names begin with: ``module.``, and twice that where the model was trained (then it is Megatron's
        data-parallel module that NeMo saves)."""
        found = next((match for name in self.stored.tensors if (match := _TABLE.fullmatch(name))), None)
        return "module." if found is None else found[1]

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, as Hugging Face names them without ``model.``."""
        output = (OUTPUT,) if self.prefix + _TABLES[OUTPUT] in self.stored.tensors else ()
        return (*expected_shapes(self.shape), *output)

    @property
    def layers_apart(self) -> bool:
        """Whether each layer was given names of its own (``non_homogeneous_layers`` in Megatron)."""
        return f"{self.prefix}{_LAYERS}0.{_GATE_UP}" in self.stored.tensors

    def check(self) -> None:
        """Compares names, shapes and dtypes with what a Qwen2 of this shape has; reads no tensor.

        Raises:
            CheckpointError: a tensor is missing or has the wrong shape.
            UnsupportedModelError: a tensor that no Qwen2 has, or one that is not floating point.
        """
        expected, where = self._expected(), str(self.folder)
        missing = [name for name in expected if name not in self.stored.tensors]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError("model.path", f"must hold the tensor `{missing[0]}`{more}", where)
        for name, stored in self.stored.tensors.items():
            if name.startswith(self.prefix + _LAYERS) and name not in expected:
                raise UnsupportedModelError("model.path", f"must be a Qwen2 and have no tensor `{name}`", where)
            if name in expected:
                padded = name.removeprefix(self.prefix) in _TABLES.values()
                _check_one(name, stored, expected[name], padded=padded)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        shape = self.shape
        hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
        query, key = shape.num_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
        of_layer: dict[str, tuple[int, ...]] = {
            _OF_LAYER["input_layernorm.weight"]: (hidden,),
            _OF_LAYER["post_attention_layernorm.weight"]: (hidden,),
            _OF_LAYER["self_attn.o_proj.weight"]: (hidden, query),
            _OF_LAYER["mlp.down_proj.weight"]: (hidden, ffn),
            f"{_QKV}weight": (query + 2 * key, hidden),
            f"{_QKV}bias": (query + 2 * key,),
            _GATE_UP: (2 * ffn, hidden),
        }
        expected: dict[str, tuple[int, ...]] = {
            self.prefix + _TABLES[EMBEDDING]: (shape.vocab_size, hidden),
            self.prefix + _FINAL_NORM: (hidden,),
        }
        if OUTPUT in self:
            expected[self.prefix + _TABLES[OUTPUT]] = (shape.vocab_size, hidden)
        for name, size in of_layer.items():
            if self.layers_apart:
                expected |= {f"{self.prefix}{_LAYERS}{layer}.{name}": size for layer in range(shape.num_layers)}
            else:
                expected[f"{self.prefix}{_LAYERS}{name}"] = (shape.num_layers, *size)
        return expected

    def reader(self) -> AbstractContextManager["NemoTensors"]:
        """Itself: files are opened as they are read."""
        return nullcontext(self)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> "torch.Tensor":
        """Rows (and columns, of a matrix) of a tensor, in the dtype of the file; reads whole tensors of a layer."""
        whole = self._whole(name)
        return whole[rows] if columns is None else whole[rows, columns]

    def _whole(self, name: str) -> "torch.Tensor":
        source = self._source(name)
        if source.layer is None:
            tensor = self.stored.read(source.name, source.rows)
        else:
            tensor = self.stored.read(source.name, slice(source.layer, source.layer + 1), source.rows)[0]
        return tensor if source.projection is None else projection(tensor, self.shape, source.projection)

    def _source(self, name: str) -> "_Source":
        if name in _TABLES:
            return _Source(name=self.prefix + _TABLES[name], rows=slice(self.shape.vocab_size))
        if name == FINAL_NORM:
            return _Source(name=self.prefix + _FINAL_NORM)
        _, number, rest = name.split(".", 2)
        rows, part, ffn = slice(None), None, self.shape.ffn_hidden_size
        if rest in _OF_LAYER:
            ours = _OF_LAYER[rest]
        elif rest in _HALVES:
            ours, rows = _GATE_UP, slice(_HALVES.index(rest) * ffn, (_HALVES.index(rest) + 1) * ffn)
        else:
            _, linear, kind = rest.split(".")
            ours, part = _QKV + kind, linear[0]
        layer, apart = (None, f"{number}.") if self.layers_apart else (int(number), "")
        return _Source(name=f"{self.prefix}{_LAYERS}{apart}{ours}", layer=layer, rows=rows, projection=part)

    def dtype(self, name: str) -> str:
        """Of a tensor, by safetensors' names."""
        return self.stored.tensors[self._source(name).name].dtype

    def bytes_of(self, name: str) -> int:
        """Of a tensor as a safetensors file holds it."""
        table = (self.shape.vocab_size, self.shape.hidden_size)
        shape = table if name in _TABLES else expected_shapes(self.shape)[name]
        return prod(shape) * {"F32": 4, "BF16": 2, "F16": 2}[self.dtype(name)]

    def raw(self) -> Callable[[str], Raw]:
        """Gives the bytes of each tensor, as a safetensors file would hold them."""
        return lambda name: Raw.of(self.read(name))


def _check_one(name: str, stored: Stored, size: tuple[int, ...], *, padded: bool) -> None:
    found = stored.shape
    if padded and found[:1] > size[:1]:
        found = (size[0], *found[1:])
    if found != size:
        rule = f"must have shape {list(size)} by {CONTEXT}/{MODEL}"
        raise CheckpointError(f"model.path: {name}", rule, list(stored.shape))
    if stored.dtype not in FLOATS:
        raise UnsupportedModelError(f"model.path: {name}", f"must be one of {', '.join(FLOATS)}", stored.dtype)
