"""From a NeMo checkpoint, written in any layout, to one rank's parameters, through Megatron's ``dist_checkpointing``.

Megatron's own sharded state dict of the model says which part of which tensor each parameter is; that part alone is
read, into the parameter itself. ``dist_checkpointing.load`` is given strategies of ours to read with: its own unpickle
``.metadata`` with whatever it names, and the bytes of what that calls no tensor (torch 2.13,
``distributed/checkpoint/filesystem.py:930``, ``default_planner.py:387``). Optimizer state, ``common.pt`` and the
modules' extra state (both pickles) are not asked for, and so not read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.base import (
    LoadCommonStrategy,
    LoadShardedStrategy,
    LoadStrategyBase,
)
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from nemo_qwen_hidden.checkpoint.adapter import Adapter, ChangesReader
from nemo_qwen_hidden.checkpoint.distributed import DistributedFiles
from nemo_qwen_hidden.checkpoint.nemo_tensors import NemoTensors
from nemo_qwen_hidden.errors import HiddenStatesError
from nemo_qwen_hidden.model.weights import assignments
from nemo_qwen_hidden.topology import Place

_Parameter = tuple[int, str]
"""Number of the chunk, and name."""


def load_nemo_weights(
    chunks: Sequence[MCoreGPTModel], tensors: NemoTensors, place: Place, adapter: Adapter | None = None
) -> None:
    """Fills every parameter of this rank's model chunks.

    Parameters that ``adapter`` changes are read in fp32, changed, and rounded once.

    Raises:
        CheckpointError: damaged bytes.
        HiddenStatesError: a parameter that no tensor was assigned to, which would leave it random.
    """
    apart = {} if adapter is None else _apart(chunks, adapter)
    wanted: dict[str, ShardedStateDict] = {}
    for number, chunk in enumerate(chunks):
        sharded = _sharded(chunk, tensors)
        unassigned = {name for name, _ in chunk.named_parameters() if tensors.prefix + name not in sharded}
        if unassigned:
            raise HiddenStatesError(f"no tensor of the checkpoint was assigned to {sorted(unassigned)}")
        for name in list(sharded):
            key = (number, name.removeprefix(tensors.prefix))
            if key in apart:
                sharded[name].data = apart[key]
        # Done here, the parts of linear_fc1 are read into their places, and not put together once more afterwards.
        apply_factories(sharded)
        wanted[f"chunk{number}"] = sharded
    with torch.no_grad():
        dist_checkpointing.load(
            wanted,
            str(tensors.stored.folder),
            sharded_strategy=_Tensors(tensors.stored),
            common_strategy=_NothingCommon(),
            validate_access_integrity=False,
        )
        for chunk in chunks:
            for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameter = dict(chunk.named_parameters()).get(name)
                if parameter is not None:
                    # what a checkpoint has past the vocabulary is whatever padding was trained to
                    parameter[max(0, tensors.shape.vocab_size - place.tp * len(parameter)) :].zero_()
        if adapter is not None:
            _change(chunks, apart, adapter, place)


class _AnyVersion(LoadStrategyBase):
    """What can be read was looked at when the checkpoint was opened (``DistributedFiles``)."""

    def check_backend_compatibility(self, loaded_backend: object) -> None:
        """Of any."""

    def check_version_compatibility(self, loaded_version: object) -> None:
        """Of any."""


class _Tensors(_AnyVersion, LoadShardedStrategy):
    """Reads parts of tensors into what asks for them, and returns nothing."""

    def __init__(self, stored: DistributedFiles) -> None:
        self._stored = stored

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> dict[str, Any]:
        for part in nested_values(sharded_state_dict):
            _fill(part, self._stored)
        return {}

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> Any:
        raise HiddenStatesError("what a checkpoint has is known already")


class _NothingCommon(_AnyVersion, LoadCommonStrategy):
    """Leaves ``common.pt`` alone, a pickle with the trainer's state, of which no weight depends; and objects."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> Any:
        if sharded_objects_state_dict:
            raise HiddenStatesError("objects of a checkpoint are never read")
        return {}


def _fill(part: ShardedTensor, stored: DistributedFiles) -> None:
    """Reads a part [*local_shape], which begins at ``global_offset`` of a tensor that may have axes before these. Of a
    table, whose padding may be another in the file, as much as there is."""
    sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    spans = [slice(start, start + size) for start, size in zip(part.global_offset, sizes, strict=True)]
    if not part.allow_shape_mismatch:
        part.data.copy_(stored.read(part.key, *spans).reshape(part.local_shape))
        return
    held = len(range(*spans[0].indices(stored.tensors[part.key].shape[0])))
    if held:
        part.data[:held].copy_(stored.read(part.key, *spans))


def _apart(chunks: Sequence[MCoreGPTModel], adapter: Adapter) -> dict[_Parameter, Tensor]:
    """For each parameter that the adapter changes, a tensor in fp32: itself, or one beside it."""
    found: dict[_Parameter, Tensor] = {}
    for number, chunk in enumerate(chunks):
        for position, layer in enumerate(chunk.decoder.layers):
            for linear in adapter.linears(layer.layer_number - 1):
                name = f"decoder.layers.{position}.{linear}.weight"
                weight = chunk.get_parameter(name).detach()
                found[number, name] = weight.float()
    return found


def _change(chunks: Sequence[MCoreGPTModel], apart: dict[_Parameter, Tensor], adapter: Adapter, place: Place) -> None:
    for number, chunk in enumerate(chunks):
        for name, fill in assignments(chunk, ChangesReader(adapter), adapter.shape, place):
            if (number, name) in apart:
                weight = apart.pop((number, name))
                change = torch.empty_like(weight)
                fill(change)
                chunk.get_parameter(name).copy_(weight.add_(change))


def _sharded(chunk: MCoreGPTModel, tensors: NemoTensors) -> dict[str, Any]:
    """The tensors of a chunk, by the names of its state dict; those of layers are parts of all layers' of the file."""
    with _of_all_layers(chunk, tensors.shape.num_layers):
        metadata = {"non_homogeneous_layers": True} if tensors.layers_apart else {}
        sharded: dict[str, Any] = chunk.sharded_state_dict(prefix=tensors.prefix, metadata=metadata)
    return {name: entry for name, entry in sharded.items() if not name.endswith("_extra_state")}


@contextmanager
def _of_all_layers(chunk: MCoreGPTModel, layers: int) -> Iterator[None]:
    """While entered, the decoder takes itself for one of so many layers: Megatron says by that number which layer of
    the file a layer is (``transformer_block.py:858``), and we may have built the first ones alone."""
    config = chunk.decoder.config
    built, config.num_layers = config.num_layers, layers
    try:
        yield
    finally:
        config.num_layers = built
