"""Losses on states in NeMo's Trainer, on ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology
from tests.support.lora import DIM, put_lora
from tests.support.training import Job, Piece, pieces_of, trainer_of
from tests.training.state_losses import (
    LENGTH,
    MICROBATCHES,
    SEQUENCES,
    USUAL,
    Case,
    Found,
    batches,
    chosen,
    chunks_of,
    errors_of,
    fill_heads,
    nothing,
)

SAMPLES = MICROBATCHES * SEQUENCES


@dataclass(frozen=True, kw_only=True)
class Run:
    """A step of NeMo's Trainer. alone: without a language model's loss. lora: trains one, ``ours`` or ``nemos``. save,
    resume: a checkpoint's folder. then_nothing: a second step, in which no token counts. packed: the batches say that
    they are. freeze: all but the heads."""

    topology: Topology
    truth: str = "gradients"
    only: tuple[str, ...] = USUAL
    settings: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    lora: str | None = None
    save: Path | None = None
    resume: Path | None = None
    steps: int = 1
    then_nothing: bool = False
    packed: bool = False
    freeze: bool = False


@dataclass(kw_only=True)
class Trained(Found):
    """values: of the first step. logged: by Lightning, last. first, pieces: the weights before the first step of this
    run, and after the last. gradients: of the first step, where a LoRA is trained, of what is trained."""

    logged: dict[str, float]
    first: list[Piece]
    pieces: list[Piece]
    gradients: list[Piece] = field(default_factory=list)


def train(rank: Rank, folder: Path, runs: Sequence[Run]) -> list[Trained]:
    """One after another."""
    # Megatron writes a checkpoint in processes of its own (dist_checkpointing/strategies/filesystem_async.py:266),
    # which a rank, being one that ends with its parent, may not start.
    current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return [_train(rank, folder, run) for run in runs]


def _train(rank: Rank, folder: Path, run: Run) -> Trained:
    from nemo.lightning.resume import AdapterPath

    from nemo_qwen_hidden.training.losses.callback import (
        StateLossCallback,
        StateLossModel,
        decoder_step,
        whole_batch_step,
    )
    from nemo_qwen_hidden.training.losses.columns import ColumnData

    settings: dict[str, Any] = {
        "state_losses": chosen(folder, run.only),
        "data_step_fn": whole_batch_step,
        "seq_length": LENGTH,
    }
    if run.alone:
        settings |= {"output_layer": False, "forward_step_fn": decoder_step}
    steps = run.steps + run.then_nothing
    job = Job(topology=run.topology, steps=steps, own_model=True, micro_batch_size=SEQUENCES, clip_grad=0.0,
              global_batch_size=SAMPLES, model=settings | dict(run.settings))  # fmt: skip
    watcher = _watcher(run, folder)
    with trainer_of(rank, job, folder / "model", [watcher, StateLossCallback()]) as (trainer, model, _):
        if run.alone:
            model = StateLossModel(model.config, optim=model.optim)
        if run.freeze:
            _freeze(model)
        made = [*batches(), *nothing()] if run.then_nothing else batches()
        data = ColumnData(
            columns(made, packed=run.packed),
            samples=SAMPLES * steps,
            micro_batch_size=SEQUENCES,
            global_batch_size=SAMPLES,
        )
        resume: Any = None if run.resume is None else str(run.resume)
        if run.lora is not None:
            lora = put_lora(trainer, model, ours=run.lora == "ours", lora_B_init_method="normal")
            assert lora.dim == DIM
            resume = resume and AdapterPath(run.resume / "weights", base_model_path=folder)  # as NeMo's AutoResume does
        try:
            trainer.fit(model, data, ckpt_path=resume)
        except ConfigError as error:
            return Trained(errors={}, values={}, error=str(error), logged={}, first=[], pieces=[])
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        pieces = pieces_of(trainer)
    found = {"errors": watcher.errors, "values": watcher.values, "gradients": watcher.gradients}
    return Trained(**found, logged=logged, first=watcher.first, pieces=pieces)


def gradients_of(trainer: Any) -> list[Piece]:
    """This rank's part of the gradients of what is trained, by the names of the weights."""
    from nemo_qwen_hidden.training.chunks import live_chunks

    trained = [p for chunk in live_chunks(trainer) for p in chunk.parameters() if p.requires_grad]
    weights = [parameter.data for parameter in trained]
    for parameter in trained:
        parameter.data = parameter.main_grad
    pieces = pieces_of(trainer)
    for parameter, values in zip(trained, weights, strict=True):
        parameter.data = values
    return [piece for piece in pieces if ".adapter." in piece.name or piece.name.startswith("state_heads.")]


def _freeze(model: Any) -> None:
    """As a ``configure_model`` of a subclass would: before DDP wraps it."""
    build = model.configure_model

    def configure_model(*arguments: Any, **named: Any) -> None:
        build(*arguments, **named)
        for name, parameter in model.module.named_parameters():
            parameter.requires_grad_("state_heads" in name)

    model.configure_model = configure_model


def columns(made: Sequence[Mapping[str, torch.Tensor]], *, packed: bool) -> dict[str, torch.Tensor]:
    """Batches as samples, so that microbatch n of one replica is batch n."""
    found = {name: torch.cat([batch[name] for batch in made]) for name in made[0]}
    whole = torch.tensor([0, LENGTH], dtype=torch.int32).expand(len(found["tokens"]), -1)
    return found | ({"cu_seqlens": whole} if packed else {})


def _watcher(run: Run, folder: Path) -> Any:
    import lightning.pytorch as pl

    from nemo_qwen_hidden.training.chunks import live_chunks

    class Watcher(pl.Callback):
        """Gives heads the weights of the test, and compares gradients after the first step's schedule."""

        errors: dict[str, float]
        values: dict[str, float]
        first: list[Piece]
        gradients: list[Piece]

        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if run.resume is None:
                for chunk in live_chunks(trainer):
                    fill_heads(chunk, load_file(folder / "heads.safetensors"), run.topology.at(trainer.global_rank))

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.errors, self.values, self.first, self.gradients = {}, {}, [], []

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if not self.first:
                self.first = pieces_of(trainer)

        def on_megatron_microbatches_end(self, step: Any, **_: Any) -> None:
            if run.lora is not None:
                self.gradients = self.gradients or gradients_of(step.pipeline.trainer)
            elif not self.errors and run.truth:
                truth = folder / run.truth
                expected = chunks_of(
                    Case(topology=run.topology, only=run.only), folder, truth, truth / "heads.safetensors"
                )
                self.errors = errors_of(live_chunks(step.pipeline.trainer), expected)

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if not self.values:
                self.values = {name: float(trainer.callback_metrics[name]) for name in run.only}
            if run.save is not None:
                trainer.save_checkpoint(run.save)

    return Watcher()
