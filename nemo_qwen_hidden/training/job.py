"""From settings to a fine-tuning run: everything that can be decided and refused before NeMo is imported."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.opened import open_weights, tokenizer_folder
from nemo_qwen_hidden.config import FinetuneSettings, check_finetuning
from nemo_qwen_hidden.data.sources import check_path
from nemo_qwen_hidden.errors import ConfigError, UserError, raise_all
from nemo_qwen_hidden.hookpoint import HookPoint, expand
from nemo_qwen_hidden.job import asked_topology, split_of
from nemo_qwen_hidden.plan.stages import stages_of
from nemo_qwen_hidden.topology import Topology, model_problems

CHECKPOINTS = "checkpoints"
"""Where NeMo keeps the checkpoints of a run (``lightning/nemo_logger.py`` of 2.7.3)."""


@dataclass(frozen=True, kw_only=True)
class FinetuningJob:
    """What will run. model_folder, data_path: on this machine. stages: layer indices of every pipeline stage. points:
    that are captured, ordered by depth; none where nothing is watched."""

    settings: FinetuneSettings
    architecture: Architecture
    topology: Topology
    stages: tuple[range, ...]
    points: tuple[HookPoint, ...]
    model_folder: Path
    data_path: str
    run_path: Path

    @property
    def log_path(self) -> Path:
        """The file beside the run's folder for what libraries say; within, NeMo moves files about."""
        return self.run_path.with_name(f"{self.run_path.name}.log")

    @property
    def fields(self) -> dict[str, Any]:
        """Names in JSONL and Parquet, as ``data.sources`` takes them."""
        data = self.settings.data
        return {"text_field": data.text_field, "messages_field": data.messages_field, "id_field": data.id_field}

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer: the one that was named, or the model's. Raises as ``tokenizer_folder`` does."""
        named = self.settings.model.tokenizer
        return tokenizer_folder(self.model_folder) if named is None else locate(named, "model.tokenizer")

    @property
    def begun(self) -> bool:
        """Whether the run has a checkpoint that it goes on from."""
        return any((self.run_path / CHECKPOINTS).glob("*-last"))


def prepare(settings: FinetuneSettings, *, world: int | None) -> FinetuningJob:
    """Checks settings against the model, the data and the run's folder. Writes nothing and imports no NeMo.

    Args:
        world: number of ranks that a launcher started, None where none did.

    Raises:
        UserError: the first thing that stands in the way, or ``ConfigErrors`` with several.
    """
    check_finetuning(settings)
    if settings.run.path is None:
        raise ConfigError("run.path", "must name the folder of the run", None)
    run_path = Path(os.path.abspath(os.path.expanduser(settings.run.path)))
    if run_path.exists() and not run_path.is_dir():
        raise ConfigError("run.path", "must be a folder, or nothing yet", str(run_path))
    folder = locate(settings.model.path)
    architecture = read_architecture(folder)
    shape = architecture.shape
    topology = asked_topology(settings.parallel, world)
    problems = model_problems(
        topology,
        num_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
    )
    problems += _training_problems(settings, architecture, topology)
    if settings.model.adapter is not None:
        rule = "must be null: training starts from whole weights"
        problems.append(ConfigError("model.adapter", rule, settings.model.adapter))
    raise_all(problems)
    stages = stages_of(shape.num_layers, pp=topology.pp, vp=topology.vp, split=split_of(settings.parallel))
    open_weights(folder, architecture)
    data_path = str(demo.text_path()) if settings.data.path is None else os.path.expanduser(settings.data.path)
    watches = settings.watch.store is not None or settings.watch.probe_store is not None
    job = FinetuningJob(
        settings=settings,
        architecture=architecture,
        topology=topology,
        stages=stages,
        points=expand(settings.capture.hook_points, num_layers=shape.num_layers) if watches else (),
        model_folder=folder,
        data_path=data_path,
        run_path=run_path,
    )
    check_path(data_path, **job.fields)
    return job


def _training_problems(settings: FinetuneSettings, architecture: Architecture, topology: Topology) -> list[UserError]:
    problems: list[UserError] = []
    train, vocab_size = settings.train, architecture.shape.vocab_size
    if vocab_size % topology.tp:  # padding would take part in the loss
        problems.append(
            ConfigError("parallel.tp", f"must divide `vocab_size` ({vocab_size}) for training", topology.tp)
        )
    at_once = train.micro_batch_size * topology.dp
    if train.global_batch_size % at_once:
        rule = f"must be a multiple of `train.micro_batch_size` times the replicas ({at_once})"
        problems.append(ConfigError("train.global_batch_size", rule, train.global_batch_size))
    elif topology.vp > 1 and train.global_batch_size // at_once % topology.pp:
        rule = f"must be a multiple of {at_once * topology.pp}, so that virtual stages take turns over all ranks"
        problems.append(ConfigError("train.global_batch_size", rule, train.global_batch_size))
    if train.seq_length > architecture.max_positions:
        rule = f"must be at most the model's max_position_embeddings ({architecture.max_positions})"
        problems.append(ConfigError("train.seq_length", rule, train.seq_length))
    if train.seq_length % topology.sequence_multiple:
        rule = f"must be a multiple of {topology.sequence_multiple} in this layout"
        problems.append(ConfigError("train.seq_length", rule, train.seq_length))
    return problems
