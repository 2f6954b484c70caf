"""Training runs of tests that train a LoRA of NeMo's, as its users do: ``llm.finetune(..., peft=LoRA(...))``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_qwen_hidden.parallel.launch import Rank
from tests.support.capturing import Captured, bystander, note
from tests.support.training import Job, trainer_of

DIM, ALPHA = 4, 2


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A job. logs: a folder for NeMo's logger. ours: our LoRA instead of NeMo's. lora: arguments of it. capture, probe:
    arguments of HiddenStatesCallback and ProbeSetCallback; None: without one. store: what the first writes to, too.
    weights: keep those of every step. saved: a checkpoint that is written after each step, over the last."""

    job: Job
    logs: Path
    ours: bool = False
    lora: dict[str, Any] = field(default_factory=dict)
    capture: dict[str, Any] | None = None
    probe: dict[str, Any] | None = None
    store: Path | None = None
    weights: bool = True
    saved: Path | None = None


def tune(rank: Rank, folder: Path, runs: Sequence[Tuning]) -> list[Captured]:
    """One run after another, all over the same ranks."""
    return [_run(rank, folder, run) for run in runs]


def _run(rank: Rank, folder: Path, run: Tuning) -> Captured:
    from nemo.collections import llm

    from nemo_qwen_hidden.training.logger import Logger
    from nemo_qwen_hidden.training.lora import LoRA
    from nemo_qwen_hidden.training.watch.callback import HiddenStatesCallback
    from nemo_qwen_hidden.training.watch.probe_set import ProbeSetCallback

    found = Captured()
    watchers = [bystander(found, run.weights)]
    if run.capture is not None:
        watchers.append(HiddenStatesCallback(to=lambda states: note(found, states), **run.capture))
        if run.store is not None:
            watchers.append(HiddenStatesCallback(to=run.store, **run.capture))
    if run.probe is not None:
        watchers.append(ProbeSetCallback(**run.probe))
    if run.saved is not None:
        watchers.append(_saver(run.saved))
    kind = LoRA if run.ours else llm.peft.LoRA
    with trainer_of(rank, run.job, folder) as (trainer, model, data):
        trainer.callbacks.extend(watchers)
        llm.finetune(
            model,
            data,
            trainer,
            log=Logger(explicit_log_dir=str(run.logs), ckpt=None),
            peft=kind(dim=DIM, alpha=ALPHA, lora_B_init_method="normal", **run.lora),
        )
    return found


def _saver(to: Path) -> Any:
    import lightning.pytorch as pl

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(to)

    return Saver()


def put_lora(trainer: Any, model: Any, *, ours: bool, **settings: Any) -> Any:
    """A LoRA into a run, as ``llm.finetune`` does it."""
    from nemo.collections import llm

    from nemo_qwen_hidden.training.lora import LoRA

    lora = (LoRA if ours else llm.peft.LoRA)(dim=DIM, alpha=ALPHA, **settings)
    model.model_transform, model.__io__.model_transform = lora, lora.__io__
    trainer.callbacks.append(lora)
    return lora


def merged(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights with adapters by Megatron's names of both, in float64 and the adapters added: W + alpha / dim * B A of
    each layer (https://arxiv.org/abs/2106.09685)."""
    found = {name: values.astype(np.float64) for name, values in weights.items() if ".adapter." not in name}
    for name, down in weights.items():
        linear, side, rest = name.partition(".adapter.linear_in.")
        if side:
            up = weights[f"{linear}.adapter.linear_out.{rest}"]
            found[f"{linear}.{rest}"] += ALPHA / DIM * up.astype(np.float64) @ down.astype(np.float64)
    return found
