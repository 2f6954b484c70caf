"""From settings to a fine-tuning run: everything that can be decided and refused before NeMo is imported."""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.nemo_context import is_nemo, read_context
from nemo_qwen_hidden.checkpoint.opened import open_weights, tokenizer_folder
from nemo_qwen_hidden.config import FinetuneSettings, check_finetuning
from nemo_qwen_hidden.data.sources import check_path
from nemo_qwen_hidden.errors import ConfigError, UserError, naming, raise_all
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, HookPoint, expand
from nemo_qwen_hidden.job import asked_topology, split_of
from nemo_qwen_hidden.plan.stages import stages_of
from nemo_qwen_hidden.store.write.locks import Lockable
from nemo_qwen_hidden.store.write.place import exists
from nemo_qwen_hidden.topology import Topology, model_problems, vocabulary_problems

CHECKPOINTS = "checkpoints"
"""Where NeMo keeps the checkpoints of a run (``lightning/nemo_logger.py`` of 2.7.3)."""
UNFINISHED = "-unfinished"
"""Ends the name of the mark (``ModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX`` of NeMo 2.7.3)."""
DATA, DATA_RECORD = "data", "data.json"
"""Blocks of tokens in the run's folder, and the file beside them that says of what."""
NEMO_LOGS = ("nemo_log_*.txt", "nemo_error_log.txt", "lightning_logs.txt", "cmd-args.log", "run_[0-9]*")
"""What NeMo 2.7.3 writes into the folder of a run that has not begun, and moves at the next start."""

RUN = Lockable(name="a folder", setting="run.path", locks="locks", error=ConfigError)
"""The run's folder, where one run works at a time."""


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
    def has_tokenizer(self) -> bool:
        """Whether there is one: data that are token ids need none."""
        if self.settings.model.tokenizer is None and is_nemo(self.model_folder):
            return isinstance(read_context(self.model_folder, "model.path").get("tokenizer"), dict)
        return any((self.tokenizer_folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))

    @property
    def begun(self) -> bool:
        """Whether the run has a checkpoint that it goes on from."""
        return bool(self.checkpoints)

    @property
    def checkpoints(self) -> list[Path]:
        """Whole ones that the run can go on from, the latest last."""
        unfinished = set(self.unfinished)
        found = [path for path in (self.run_path / CHECKPOINTS).glob("*-last") if path not in unfinished]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    @property
    def unfinished(self) -> list[Path]:
        """Checkpoints that a crash has cut off; NeMo marks each with a file beside it until it is whole."""
        marks = (self.run_path / CHECKPOINTS).glob(f"*{UNFINISHED}")
        return [path.with_name(path.name.removesuffix(UNFINISHED)) for path in marks]


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
    _require_own(run_path, settings)
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
    if settings.train.keep_checkpoints and "step" in str(run_path):
        rule = "must have no `step` in it where `train.keep_checkpoints` is above 0: NeMo 2.7.3 looks for it there"
        problems.append(ConfigError("run.path", rule, str(run_path)))
    if settings.model.adapter is not None:
        rule = "must be null: training starts from whole weights"
        problems.append(ConfigError("model.adapter", rule, settings.model.adapter))
    raise_all(problems)
    stages = stages_of(shape.num_layers, pp=topology.pp, vp=topology.vp, split=split_of(settings.parallel))
    layers = settings.train.recompute_layers
    if settings.train.recompute == "uniform" and any(len(stage) % layers for stage in stages):
        rule = f"must divide the layers of every stage ({', '.join(str(len(stage)) for stage in stages)})"
        raise ConfigError("train.recompute_layers", rule, layers)
    open_weights(folder, architecture)
    data_path = str(demo.text_path()) if settings.data.path is None else os.path.expanduser(settings.data.path)
    watches = settings.watch.store is not None or settings.watch.probe_store is not None
    points = expand(settings.capture.hook_points, num_layers=shape.num_layers) if watches else ()
    if any(point.site == ATTN_WEIGHTS for point in points):
        rule = f"must leave out {ATTN_WEIGHTS} in training: they grow with the square of the tokens"
        raise ConfigError("capture.hook_points", rule, list(settings.capture.hook_points))
    job = FinetuningJob(
        settings=settings,
        architecture=architecture,
        topology=topology,
        stages=stages,
        points=points,
        model_folder=folder,
        data_path=data_path,
        run_path=run_path,
    )
    check_path(data_path, **job.fields)
    if settings.watch.probe_data is not None:
        with naming({"data.path": "watch.probe_data"}):
            check_path(os.path.expanduser(settings.watch.probe_data), **job.fields)
    if not job.begun:
        for name in ("store", "probe_store"):
            path = getattr(settings.watch, name)
            if path is not None and Path(path).expanduser().is_file():
                raise ConfigError(f"watch.{name}", "must be a folder, or nothing yet", path)
            if path is not None and exists(Path(path).expanduser()):
                rule = "must be a new folder where the run begins; a run that has a checkpoint goes on with its own"
                raise ConfigError(f"watch.{name}", rule, path)
    return job


def _require_own(run_path: Path, settings: FinetuneSettings) -> None:
    """NeMo moves whatever it finds in the folder of a run that is begun."""
    if any((run_path / name).exists() for name in (CHECKPOINTS, f"{DATA}/{DATA_RECORD}")) or not run_path.exists():
        return
    ours = {DATA, RUN.locks, "tokenizer", "tensorboard"}
    ours |= {Path(path).name for path in (settings.watch.store, settings.watch.probe_store) if path is not None}
    names = {path.name for path in run_path.iterdir()} - ours
    foreign = sorted(name for name in names if not any(map(partial(fnmatch, name), NEMO_LOGS)))
    if foreign:
        rule = f"must be a new folder, an empty one or that of a run; this one holds `{foreign[0]}`"
        raise ConfigError("run.path", rule, str(run_path))


def _training_problems(settings: FinetuneSettings, architecture: Architecture, topology: Topology) -> list[UserError]:
    train = settings.train
    problems = vocabulary_problems(topology, architecture.shape.vocab_size)
    if train.lora_dim is not None and topology.vp > 1:  # NeMo would leave the adapter out of checkpoints
        problems.append(ConfigError("parallel.vp", "must be 1 where `train.lora_dim` is given", topology.vp))
    if train.lora_dim is not None and train.lora_dim % topology.tp:
        problems.append(
            ConfigError("train.lora_dim", f"must be a multiple of `parallel.tp` ({topology.tp})", train.lora_dim)
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
    if architecture.sliding_window is not None and train.seq_length > architecture.sliding_window:
        rule = f"must be at most the model's sliding window ({architecture.sliding_window}): no other is trained with"
        problems.append(ConfigError("train.seq_length", rule, train.seq_length))
    if train.seq_length % topology.sequence_multiple:
        rule = f"must be a multiple of {topology.sequence_multiple} in this layout"
        problems.append(ConfigError("train.seq_length", rule, train.seq_length))
    return problems
