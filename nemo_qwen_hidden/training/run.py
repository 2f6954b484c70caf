"""One rank's part of a fine-tuning run: NeMo's trainer, strategy, optimizer, logger and checkpoints, wired."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.model.qwen2 import Qwen2Model
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from torch.distributed import Store  # type: ignore[attr-defined]

from nemo_qwen_hidden.data.tokenizer import TOKENIZER_FILES
from nemo_qwen_hidden.model.config import TORCH_DTYPES, configure_training
from nemo_qwen_hidden.parallel.launch import fair_threads, local_world
from nemo_qwen_hidden.parallel.watch import Pulse
from nemo_qwen_hidden.progress import Phase, TrainingReport, TrainingStep, silent
from nemo_qwen_hidden.store.write.locks import rank_lock
from nemo_qwen_hidden.training.data import TextData
from nemo_qwen_hidden.training.job import CHECKPOINTS, RUN, FinetuningJob
from nemo_qwen_hidden.training.logger import Checkpoints, Logger
from nemo_qwen_hidden.training.lora import LoRA
from nemo_qwen_hidden.training.optimizer import MegatronOptimizer
from nemo_qwen_hidden.training.rates import Lengthening
from nemo_qwen_hidden.training.strategy import megatron_strategy
from nemo_qwen_hidden.training.watch.callback import HiddenStatesCallback
from nemo_qwen_hidden.training.watch.probe_set import ProbeSetCallback


def fit(
    job: FinetuningJob,
    *,
    report: TrainingReport = silent,
    pulse: Pulse | None = None,
    rendezvous: Path | Store | None = None,
) -> None:
    """Trains, or goes on from the run's last checkpoint, to ``train.max_steps``. Collective over all ranks.

    Args:
        pulse: is told of every step, for whoever watches this rank.
        rendezvous: where the ranks meet, as ``megatron_strategy`` takes it.

    Raises:
        DataError: data that cannot be used.
        ConfigError: another run begins to work in the folder.
    """
    torch.set_num_threads(job.settings.runtime.threads or fair_threads(job.topology.world))
    pl.seed_everything(job.settings.train.seed)
    pulse = pulse or Pulse()
    progress, longer = _Progress(job, report, pulse), Lengthening(job.settings.train.max_steps, report)
    (job.run_path / RUN.locks).mkdir(parents=True, exist_ok=True)
    with rank_lock(job.run_path, of=RUN), pulse.running():
        llm.train(
            model=_model(job),
            data=TextData(job),
            trainer=_trainer(job, [progress, longer, *_watchers(job)], rendezvous),
            log=_logger(job),
            resume=nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
            model_transform=None if job.settings.train.lora_dim is None else LoRA(dim=job.settings.train.lora_dim),
        )


def _model(job: FinetuningJob) -> Qwen2Model:
    train, dtype = job.settings.train, job.settings.precision.compute
    more: dict[str, Any] = {"seq_length": train.seq_length, **_recompute(train.recompute, train.recompute_layers)}
    if job.begun and train.lora_dim is None:  # a checkpoint brings the weights
        more["weights"] = None
    config = configure_training(job.model_folder, job.topology, stages=job.stages, dtype=dtype, **more)
    optimizer = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        clip_grad=train.clip_grad,
        bf16=dtype == "bf16",
        params_dtype=TORCH_DTYPES[dtype],
        use_distributed_optimizer=False,
    )
    schedule = CosineAnnealingScheduler(
        max_steps=train.max_steps, warmup_steps=train.warmup_steps, constant_steps=0, min_lr=train.min_lr
    )
    optim = MegatronOptimizer(optimizer, lr_scheduler=schedule)
    return Qwen2Model(config, optim=optim, tokenizer=_tokenizer(job))


def _tokenizer(job: FinetuningJob) -> AutoTokenizer | None:
    """The model's, for the checkpoints; out of a folder with nothing else, which NeMo copies whole into each."""
    if not job.has_tokenizer:
        return None
    given = job.tokenizer_folder
    folder = job.run_path / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *TOKENIZER_FILES):
        source, own = given / name, folder / f".{name}.{os.getpid()}"
        if source.is_file():
            shutil.copyfile(source, own)
            own.replace(folder / name)  # whole at once: other ranks do the same
    return AutoTokenizer(os.fspath(folder))


def _recompute(how: str, layers: int) -> dict[str, Any]:
    """``train.recompute`` as Megatron says it."""
    if how == "none":
        return {}
    if how == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": how, "recompute_num_layers": layers}


def _trainer(job: FinetuningJob, callbacks: list[Callback], rendezvous: Path | Store | None) -> nl.Trainer:
    train, dtype, world = job.settings.train, job.settings.precision.compute, job.topology.world
    devices = local_world(world)
    validates = train.validation_part > 0
    batches = 1.0 if train.validation_batches is None else train.validation_batches
    trainer = nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=devices,
        num_nodes=world // devices,
        strategy=megatron_strategy(job.topology, stages=job.stages, dtype=dtype, rendezvous=rendezvous),
        plugins=nl.MegatronMixedPrecision(precision="bf16-mixed") if dtype == "bf16" else None,
        max_steps=train.max_steps,
        limit_val_batches=batches if validates else 0,
        val_check_interval=min(train.validation_every, train.max_steps) if validates else None,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,  # NeMo's logger brings the callback for it
        enable_model_summary=False,
        logger=False,
    )
    trainer.callbacks.extend(callbacks)  # what the constructor is given, NeMo copies deeply, for its checkpoints
    return trainer


def _logger(job: FinetuningJob) -> Logger:
    train = job.settings.train
    checkpoints = Checkpoints(
        monitor="step",
        mode="max",
        filename="{step}",
        every_n_train_steps=train.checkpoint_every,
        save_top_k=train.keep_checkpoints,
        save_last=True,
        save_optim_on_train_end=True,
    )
    path = os.fspath(job.run_path)
    return Logger(
        explicit_log_dir=path,
        ckpt=checkpoints,
        tensorboard=TensorBoardLogger(save_dir=path, name="tensorboard", version=""),
        update_logger_directory=False,
    )


def _watchers(job: FinetuningJob) -> list[Callback]:
    """Callbacks that capture hidden states while the model trains."""
    watch, points, watchers = job.settings.watch, [str(point) for point in job.points], list[Callback]()
    stored, nonfinite = job.settings.precision.stored, job.settings.precision.nonfinite
    chosen: dict[str, Any] = {"hook_points": points, "every": watch.every, "dtype": stored, "nonfinite": nonfinite}
    if watch.store is not None:
        store = os.path.expanduser(watch.store)
        watchers.append(HiddenStatesCallback(to=store, phases=watch.phases, **chosen))
    if watch.probe_store is not None:
        store = os.path.expanduser(watch.probe_store)
        watchers.append(
            ProbeSetCallback(
                to=store,
                documents=watch.probe_data,
                max_documents=watch.probe_documents,
                labels=watch.probe_labels,
                tokenizer=job.tokenizer_folder if job.has_tokenizer else None,
                **chosen | job.fields,
            )
        )
    return watchers


class _Progress(Callback):
    """Tells of each step what NeMo has logged of it."""

    def __init__(self, job: FinetuningJob, report: TrainingReport, pulse: Pulse) -> None:
        self._train, self._report, self._pulse = job.settings.train, report, pulse
        self._begun, self._path = job.begun, job.run_path / CHECKPOINTS
        self._since, self._steps = time.perf_counter(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            done = trainer.global_step
            self._report(Phase(f"resuming after step {done}" if done else "training"))
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._pulse.progressed()
        self._steps += 1
        step, train = trainer.global_step, self._train
        if trainer.is_global_zero and (step % train.log_every == 0 or step == train.max_steps):
            self._tell(trainer, None)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._pulse.progressed()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pulse.progressed()
        if trainer.is_global_zero:
            self._tell(trainer, float(trainer.callback_metrics["val_loss"]))

    def _tell(self, trainer: pl.Trainer, validation_loss: float | None) -> None:
        metrics, train = trainer.callback_metrics, self._train
        tokens = self._steps * train.global_batch_size * train.seq_length
        self._report(
            TrainingStep(
                step=trainer.global_step,
                steps=train.max_steps,
                loss=float(metrics["reduced_train_loss"]),
                grad_norm=float(metrics["grad_norm"]),
                lr=float(trainer.optimizers[0].param_groups[0]["lr"]),
                validation_loss=validation_loss,
                tokens_per_second=tokens / (time.perf_counter() - self._since),
            )
        )
