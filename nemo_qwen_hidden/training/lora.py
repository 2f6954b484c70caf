"""NeMo's LoRA, with what NeMo 2.7.3 leaves out; it is given to ``llm.finetune(..., peft=LoRA(...))`` as NeMo's is."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo.collections.llm import peft
from nemo.lightning.pytorch.callbacks.peft import WrappedAdapterIO
from torch import Tensor, nn

from nemo_qwen_hidden.errors import ConfigError


class LoRA(peft.LoRA):
    """NeMo's LoRA, with its arguments and defaults. What it adds:

    - Heads of losses on states are trained and saved along. NeMo freezes whatever is no adapter.
    - Layers that are recomputed in full are trained. What goes into the first layer needs no gradient where the
      embeddings are frozen, and then nothing that PyTorch recomputes after it gets one
      (``tensor_parallel/random.py: CheckpointFunction`` of megatron-core 0.16.1): NeMo's own leaves the adapters of the
      first stage as they were, and says nothing.
    - A run goes on whose weights came from the model's configuration (``weights``). NeMo would read them again from the
      NeMo checkpoint that they came from.

    Raises:
        ConfigError: virtual pipeline stages, of which NeMo 2.7.3 saves no adapter
            (``lightning/pytorch/callbacks/peft.py: adapter_key_filter`` sees the names of stages alone).
    """

    _weights: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """As NeMo's."""
        virtual = getattr(trainer.strategy, "virtual_pipeline_model_parallel_size", None)
        if virtual is not None and virtual > 1:
            rule = "must be None with a LoRA, which NeMo then leaves out of checkpoints"
            raise ConfigError("virtual_pipeline_model_parallel_size", rule, virtual)
        self._weights = getattr(getattr(pl_module, "config", None), "weights", None)
        super().setup(trainer, pl_module, stage=stage)

    def __call__(self, model: nn.Module) -> nn.Module:
        """As NeMo's."""
        transformed: nn.Module = super().__call__(model)
        for chunk in _chunks(transformed):
            if chunk.pre_process and chunk.config.recompute_granularity == "full":
                chunk.embedding.register_forward_hook(_with_gradient)
        return transformed

    def freeze_model(self, model: nn.Module) -> None:
        """As NeMo's, but for the heads of losses."""
        super().freeze_model(model)
        for chunk in _chunks(model):
            if hasattr(chunk, "state_heads"):
                chunk.state_heads.requires_grad_(True)

    def adapter_key_filter(self, key: Any) -> bool:
        """As NeMo's, and whether it is of a head of a loss."""
        return bool(super().adapter_key_filter(key)) or (isinstance(key, str) and ".state_heads." in key)

    def get_wrappped_io(self) -> Callable[..., WrappedAdapterIO]:
        """As NeMo's (the name is NeMo's too)."""
        if self._weights is None:
            made: Callable[..., WrappedAdapterIO] = super().get_wrappped_io()
            return made
        return partial(_AdapterIO, peft=self, weights=self._weights)


class _AdapterIO(WrappedAdapterIO):
    """Of a model that is built with its weights: of a checkpoint only the adapter is read."""

    def __init__(self, checkpoint_io: Any = None, *, peft: LoRA, weights: str) -> None:
        super().__init__(checkpoint_io, peft)
        self.model_ckpt_path = Path(weights)

    def load_checkpoint(
        self, path: Any, sharded_state_dict: Any = None, map_location: Any = None, strict: Any = None
    ) -> dict[str, Any]:
        """NeMo calls it for the weights of the model, with a path that knows theirs, and later for the adapter's."""
        if getattr(path, "base_model_path", None) is None:
            loaded: dict[str, Any] = super().load_checkpoint(path, sharded_state_dict, map_location, strict)
            return loaded
        self.adapter_ckpt_path = Path(str(path))
        of_run = self.checkpoint_io.load_checkpoint(path, sharded_state_dict={})
        as_built = sharded_state_dict["state_dict"]
        return {**of_run, "state_dict": {name: entry.data for name, entry in as_built.items()}}


def _chunks(model: nn.Module) -> Iterator[MCoreGPTModel]:
    return (module for module in model.modules() if isinstance(module, MCoreGPTModel))


def _with_gradient(embedding: nn.Module, _inputs: Any, embeddings: Tensor) -> None:
    if embedding.training and embeddings.is_leaf:
        embeddings.requires_grad_()
