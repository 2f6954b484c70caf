"""Losses on states in NeMo's Trainer.

config = configure_training(folder, topology, stages=stages, state_losses=losses, data_step_fn=whole_batch_step)
trainer = nl.Trainer(callbacks=[StateLossCallback()], strategy=megatron_strategy(topology), ...)
"""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo.collections.llm.gpt.model.base import gpt_data_step
from nemo.lightning.megatron_parallel import MegatronLossReduction, MegatronStep
from torch import Tensor

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
from nemo_qwen_hidden.training.chunks import live_chunks, live_groups, live_peft
from nemo_qwen_hidden.training.losses.attach import AttachedLosses, require_padded
from nemo_qwen_hidden.training.losses.state_loss import StateLoss

WHOLE = "whole_batch"


def whole_batch_step(iterator: Iterator[Any]) -> dict[str, Any]:
    """NeMo's data step of a GPT, which leaves each stage what it needs, cut for its context-parallel rank; and beside
    it, under ``whole_batch``, the batch as the data module gave it, which losses on states take labels from."""
    given = next(iterator)
    batch: dict[str, Any] = gpt_data_step(iter([given]))
    return {**batch, WHOLE: _batch_of(given)}


def _batch_of(given: Any) -> Any:
    """What NeMo's data loaders give is a batch, or one with its number and its loader's."""
    return given[0] if isinstance(given, tuple) else given


class StateLossCallback(pl.Callback):
    """Attaches the losses of the model's configuration (``state_losses``) to its states, and logs the mean of each in
    every step by its name, in validation as ``val_`` and its name.

    Raises (when the run starts):
        ConfigError: the configuration has no such losses, or its ``data_step_fn`` is not ``whole_batch_step``; or the
            batches are packed, on every rank, before a schedule begins; or in the first step, a PEFT of NeMo's has
            frozen the heads (``training.lora.LoRA`` does not).
    """

    def __init__(self) -> None:
        self._attached: AttachedLosses | None = None
        self._losses: tuple[StateLoss, ...] = ()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    def on_megatron_step_start(self, step: MegatronStep[Any, Any]) -> MegatronStep[Any, Any]:
        """Called by NeMo before it takes the data of a schedule, on every rank. Looks at the first of them: in the
        schedule a stage that refuses leaves others waiting."""
        if self._attached is None or not isinstance(step.data, Iterator):
            return step
        first = next(step.data)
        require_padded(_batch_of(first))
        return dataclasses.replace(step, data=chain([first], step.data))

    def on_megatron_microbatches_start(self, step: MegatronStep[Any, Any]) -> None:
        """Called by NeMo before each schedule."""
        if self._attached is not None:
            assert step.num_microbatches is not None
            if not step.forward_only:
                _require_trained_heads(step.pipeline.trainer)
            self._attached.begin_step(num_microbatches=step.num_microbatches, forward_only=step.forward_only)

    def on_megatron_microbatch_start(self, step: MegatronStep[Any, Any], batch: Mapping[str, Any], **_: Any) -> None:
        """Called by NeMo before each call of the model."""
        if self._attached is not None:
            if WHOLE not in batch:
                raise ConfigError("data_step_fn", "must be whole_batch_step where losses are on states", "another")
            self._attached.begin_microbatch(batch[WHOLE])

    def on_megatron_microbatches_end(self, step: MegatronStep[Any, Any], **_: Any) -> None:
        """Called by NeMo after each schedule. Collective over all ranks."""
        if self._attached is None:
            return
        values = self._attached.end_step()
        total = sum(loss.weight * values[loss.name] for loss in self._losses)
        for model in step.pipeline:
            model.state_loss = total
        model, prefix = step.pipeline.trainer.lightning_module, "val_" if step.forward_only else ""
        for name, value in values.items():
            model.log(prefix + name, value, batch_size=1, on_step=not step.forward_only, on_epoch=step.forward_only)

    def _attach(self, trainer: pl.Trainer) -> None:
        if self._attached is not None:
            return
        chunks: list[MCoreGPTModel] = live_chunks(trainer)
        self._losses = tuple(getattr(chunks[0].config, "state_losses", ()))
        if not self._losses:
            raise ConfigError("state_losses", "must be set in the model's configuration", self._losses)
        self._attached = AttachedLosses(chunks, self._losses, live_groups(trainer))


def _require_trained_heads(trainer: pl.Trainer) -> None:
    """NeMo's PEFT freezes whatever is no adapter, after this callback has attached the losses."""
    peft = live_peft(trainer)
    if peft is None:
        return
    for chunk in live_chunks(trainer):
        heads = getattr(chunk, "state_heads", None)
        if heads is not None and not all(parameter.requires_grad for parameter in heads.parameters()):
            rule = "must leave the heads of losses to be trained, as `training.lora.LoRA` does"
            kind = type(peft)
            raise ConfigError("peft", rule, f"{kind.__module__}.{kind.__qualname__}")


class StateLossModel(Qwen2HiddenModel):
    """A model that is trained by its losses on states alone, as a classifier is; it has no output layer
    (``output_layer=False``, ``forward_step_fn=decoder_step``). What NeMo logs as its loss is the weighted sum of
    them."""

    state_loss: float = 0.0

    @property
    def training_loss_reduction(self) -> "StateLossReduction":
        """Of a step."""
        return StateLossReduction(self)

    @property
    def validation_loss_reduction(self) -> "StateLossReduction":
        """Of a step."""
        return StateLossReduction(self)


class StateLossReduction(MegatronLossReduction):
    """A main loss of zero, whose backward pass starts those of the states."""

    def __init__(self, model: StateLossModel) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, or it would be a submodule

    def forward(self, batch: Mapping[str, Tensor], forward_out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Zero, the tokens that count, and nothing to be reduced."""
        return (forward_out * 0).sum(), batch["loss_mask"].sum().int(), {"zero": torch.zeros(1)}

    def reduce(self, losses_reduced_per_micro_batch: Any) -> Tensor:
        """The weighted sum of the losses on states in this step."""
        return torch.tensor(self._model[0].state_loss)


def decoder_step(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """NeMo's forward step for a model without an output layer."""
    output: Tensor = model(input_ids=batch["tokens"], position_ids=batch["position_ids"])
    return output
