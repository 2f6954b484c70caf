"""From a NeMo checkpoint, written in any layout, to one rank's parameters, through Megatron's ``dist_checkpointing``.

Megatron's own sharded state dict of the model says which part of which tensor each parameter is; that part alone is
read, into the parameter itself. Optimizer state, Megatron's ``common.pt`` and the modules' extra state (both pickles)
are not asked for, and so not read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, apply_factories
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from nemo_qwen_hidden.checkpoint.adapter import Adapter, ChangesReader
from nemo_qwen_hidden.checkpoint.nemo_tensors import NemoTensors
from nemo_qwen_hidden.errors import HiddenStatesError
from nemo_qwen_hidden.model.weights import assignments
from nemo_qwen_hidden.parallel.host import megatron_on_host
from nemo_qwen_hidden.topology import Place

_Parameter = tuple[int, str]
"""Number of the chunk, and name."""


def load_nemo_weights(
    chunks: Sequence[MCoreGPTModel], tensors: NemoTensors, place: Place, adapter: Adapter | None = None
) -> None:
    """Fills every parameter of this rank's model chunks. Collective over all ranks.

    Parameters that ``adapter`` changes are read in fp32, changed, and rounded once.

    Raises:
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
    with torch.no_grad(), megatron_on_host():
        dist_checkpointing.load(
            wanted,
            str(tensors.stored.folder),
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


class _NothingCommon(LoadCommonStrategy):
    """Leaves ``common.pt`` alone: a pickle with the trainer's state, of which no weight depends."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> Any:
        raise HiddenStatesError("objects of a checkpoint are never read")

    def check_backend_compatibility(self, loaded_backend: object) -> None:
        """Of any."""

    def check_version_compatibility(self, loaded_version: object) -> None:
        """Of any."""
