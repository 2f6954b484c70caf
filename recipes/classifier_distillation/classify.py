"""A sequence classifier on half of a model's layers, with and without the states of the whole model to learn from:

python recipes/classifier_distillation/classify.py
"""

import json
import sysconfig
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from transformers import AutoTokenizer

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.model.config import configure_training
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.topology import Topology
from nemo_qwen_hidden.training.losses.callback import (
    StateLossCallback,
    StateLossModel,
    decoder_step,
    whole_batch_step,
)
from nemo_qwen_hidden.training.losses.columns import ColumnData, padded_columns
from nemo_qwen_hidden.training.losses.kinds import Distillation, SequenceClassifier
from nemo_qwen_hidden.training.optimizer import MegatronOptimizer
from nemo_qwen_hidden.training.ranks import as_if_torchrun
from nemo_qwen_hidden.training.strategy import megatron_strategy

MODEL = demo.model_folder()
PACKAGES = ("asyncio", "email")  # of the standard library: which of them is a snippet from?
LAYERS, TEACHERS = 3, (1, 3, 5)  # layer i of the student learns from layer TEACHERS[i] of the whole model
TOPOLOGY = Topology(tp=2, sp=True)
STEPS, BATCH, MICROBATCH, LENGTH, LINES, LR = 40, 32, 8, 48, 6, 1e-3

Columns = dict[str, torch.Tensor]


def snippets(folder: Path) -> list[Path]:
    """Of each package every fourth file is held out; a snippet is ``LINES`` lines of a file."""
    found: dict[str, list[str]] = {"train": [], "held_out": []}
    for label, package in enumerate(PACKAGES):
        for number, file in enumerate(sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))):
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            for start in range(0, len(lines) - LINES, 5 * LINES):
                record = {
                    "text": "\n".join(lines[start : start + LINES]),
                    "id": f"{label}/{package}/{file.name}/{start}",
                }
                found["held_out" if number % 4 == 0 else "train"].append(json.dumps(record) + "\n")
    for name, records in found.items():
        (folder / f"{name}.jsonl").write_text("".join(records))
    return [folder / f"{name}.jsonl" for name in found]


def columns(data: Path, store: Path | None) -> Columns:
    """What the trainer gets of each snippet: its tokens, which package it is from, and which rows of the store are its
    states in the whole model."""
    records = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoded = tokenizer(
        [each["text"] for each in records],
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        padding_side="right",
        return_tensors="pt",
    )
    lengths = encoded.attention_mask.sum(dim=1)
    made = padded_columns(encoded.input_ids, lengths)
    made["classes"] = torch.tensor([int(each["id"][0]) for each in records])
    made["teacher_rows"] = torch.full_like(encoded.input_ids, -1)
    if store is not None:
        tokens = open_store(store).tokens
        for sample in range(len(records)):
            rows = tokens.document_rows(sample)
            length = min(int(lengths[sample]), len(rows))
            made["teacher_rows"][sample, :length] = rows.start + torch.arange(length)
    return made


def train(rank: Rank, store: Path | None, training: Columns, held_out: Columns, steps: int) -> dict[str, float]:
    """NeMo's trainer on one rank; what it logged last."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    losses: list[Distillation | SequenceClassifier] = [SequenceClassifier(name="class", classes=2, last="last")]
    if store is not None:
        losses += [
            Distillation(
                name=f"layer{layer}",
                hook_point=f"resid_post@{layer}",
                store=str(store),
                teacher=f"resid_post@{teacher}",
                distance="cosine",
            )
            for layer, teacher in enumerate(TEACHERS)
        ]
    stages = (range(LAYERS),)
    config = configure_training(
        MODEL,
        TOPOLOGY,
        stages=stages,
        output_layer=False,
        seq_length=LENGTH,
        state_losses=tuple(losses),
        data_step_fn=whole_batch_step,
        forward_step_fn=decoder_step,
    )
    optimizer = OptimizerConfig(optimizer="adam", lr=LR, clip_grad=1.0, use_distributed_optimizer=False)
    data = ColumnData(
        training, held_out, samples=steps * BATCH, micro_batch_size=MICROBATCH, global_batch_size=BATCH, seed=0
    )
    with as_if_torchrun(rank):
        trainer = nl.Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=rank.world,
            strategy=megatron_strategy(TOPOLOGY, stages=stages, rendezvous=rank.rendezvous),
            callbacks=[StateLossCallback()],
            max_steps=steps,
            val_check_interval=steps,
            limit_val_batches=1.0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            logger=False,
        )
        model: pl.LightningModule = StateLossModel(config, optim=MegatronOptimizer(optimizer))
        trainer.fit(model, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def compare(folder: Path, steps: int = STEPS) -> dict[str, dict[str, float]]:
    """The whole recipe; its files go to ``folder``."""
    data, held_out_data = snippets(folder)
    store = folder / "teacher"
    points = ",".join(f"resid_post@{layer}" for layer in TEACHERS)
    status = main(
        [
            "extract",
            f"model.path={MODEL}",
            f"data.path={data}",
            f"store.path={store}",
            f"capture.hook_points=[{points}]",
        ]
    )
    if status:
        raise SystemExit(status)
    held_out, found = columns(held_out_data, None), {}
    shares = torch.bincount(held_out["classes"]) / len(held_out["classes"])
    print(f"{len(held_out['classes'])} held-out snippets; always {PACKAGES[int(shares.argmax())]}: {shares.max():.3f}")
    for name, teacher in (("classifier", None), ("with distillation", store)):
        work = (teacher, columns(data, teacher), held_out, steps)
        found[name], *_ = run_ranks(train, work, world=TOPOLOGY.world, log=folder / "ranks.log")
        print(f"{name}: accuracy {found[name]['val_class_accuracy']:.3f}, loss {found[name]['val_class']:.3f}")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch))
