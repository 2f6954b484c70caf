"""From settings to a job: everything that can be decided and refused before NeMo is imported or a rank is started."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from glob import has_magic
from math import prod
from pathlib import Path
from typing import Any

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.checkpoint.adapter import Adapter
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.opened import open_weights, tokenizer_folder
from nemo_qwen_hidden.config import BYTES, MEANS, ParallelSettings, Settings, check
from nemo_qwen_hidden.data.sources import check_path, read_documents
from nemo_qwen_hidden.data.tokenize import TokenizedDocument, tokenize
from nemo_qwen_hidden.data.tokenizer import Tokenizer
from nemo_qwen_hidden.errors import ConfigError, UserError, raise_all
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, HookPoint, deepest, expand, heads_of
from nemo_qwen_hidden.parallel.launch import has_gpus
from nemo_qwen_hidden.parallel.machine import find_machine
from nemo_qwen_hidden.plan.auto import Choice, choose
from nemo_qwen_hidden.plan.cost import Machine, Need, Work, stage_need
from nemo_qwen_hidden.plan.footprint import MLP_ROWS
from nemo_qwen_hidden.plan.hardware import Host
from nemo_qwen_hidden.plan.microbatches import Batching
from nemo_qwen_hidden.plan.outliers import norm_point
from nemo_qwen_hidden.plan.scaling import Corpus, Estimate, estimate
from nemo_qwen_hidden.plan.shapes import state_shape
from nemo_qwen_hidden.plan.stages import Split, points_of_stage, stages_of
from nemo_qwen_hidden.store.format import DTYPES, MARKER, TOKENS, shard_name
from nemo_qwen_hidden.store.shard import state_bytes
from nemo_qwen_hidden.store.write.place import check_target
from nemo_qwen_hidden.topology import Topology, model_problems, resolve_dp
from nemo_qwen_hidden.trace.whole import check_place


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What follows from settings and a model's sizes alone, without weights or data.

    points: ordered by depth. stages: layer indices of every pipeline stage; unless the settings say how the whole model
    is divided, these are the layers up to the deepest hook point alone. work: what plans of memory and time are made
    from. norms_only: whether the norm of each state is stored instead of the state. choice: why this layout, where
    ``parallel.auto`` chose it.
    """

    settings: Settings
    architecture: Architecture
    points: tuple[HookPoint, ...]
    topology: Topology
    stages: tuple[range, ...]
    work: Work
    batching: Batching
    norms_only: bool = False
    choice: Choice | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers that are built."""
        return self.stages[-1].stop

    @property
    def split(self) -> Split:
        """How the settings divide the layers into stages."""
        return split_of(self.settings.parallel)

    @property
    def final_norm(self) -> bool:
        """Whether the final norm is needed."""
        return any(point.normed for point in self.points)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads whose weights are asked for."""
        return heads_of(self.settings.capture.heads, self.architecture.shape.num_heads)

    def state_shape(self, point: HookPoint) -> tuple[int, ...]:
        """Of one state as it is stored."""
        if self.norms_only:
            return (1,)
        return state_shape(point, self.architecture.shape, keys=self.batching.max_tokens, heads=self.heads)

    def rank_bytes(self, stage: int) -> Need:
        """Bytes of a rank for this stage."""
        return stage_need(stage, self.stages, self.topology, self.work)

    def points_of(self, stage: int) -> tuple[HookPoint, ...]:
        """Hook points that are seen on this stage."""
        return points_of_stage(self.points, self.stages, stage)

    def estimate(self, corpus: Corpus, machine: Machine, host: Host) -> Estimate:
        """Time, bytes and what binds."""
        dtype, divisor = DTYPES[self.settings.stored_dtype], self.settings.tokens.pool not in MEANS
        return estimate(
            self.topology,
            self.stages,
            self.work,
            machine,
            host,
            corpus,
            state_bytes=lambda point: state_bytes(
                prod(self.state_shape(point)), dtype=dtype, divisor=divisor and point.normed
            ),
            to_rank_0=self.settings.capture.gather == "rank0",
        )


@dataclass(frozen=True, kw_only=True)
class Job(Outline):
    """What will run. model_folder, data_path: on this machine."""

    model_folder: Path
    data_path: str

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of the adapter; None where there is none."""
        path = self.settings.model.adapter
        return None if path is None else Path(path).expanduser()

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer.

        Raises:
            CheckpointError: none is named, or it is on the hub and cannot be fetched.
        """
        named = self.settings.model.tokenizer
        return tokenizer_folder(self.model_folder) if named is None else locate(named, "model.tokenizer")

    @property
    def store_path(self) -> Path:
        """The folder of the store; only of a job that was prepared with ``for_store``."""
        path = self.settings.store.path
        if path is None:
            raise ConfigError("store.path", "must name the folder to write the hidden states to", None)
        return Path(path).expanduser()

    @property
    def log_path(self) -> Path:
        """The file beside the store for what libraries say while it is made."""
        store = Path(os.path.abspath(self.store_path))
        return store.with_name(f"{store.name}.log")

    @property
    def trace_path(self) -> Path | None:
        """The file for what ranks do when; None where nobody asked for it."""
        path = self.settings.profile.trace
        return None if path is None else Path(path).expanduser()

    def documents(self, tokenizer: Callable[[], Tokenizer]) -> Iterator[TokenizedDocument]:
        """The data, read and tokenized as they are asked for, with the masks that ``tokens.keep`` needs.

        Raises:
            UserError: from the iterator, documents that cannot be used.
        """
        return tokenize(
            read_documents(self.data_path, **_fields(self.settings)),
            tokenizer,
            vocab_size=self.architecture.shape.vocab_size,
            assistant=self.settings.tokens.keep == "assistant",
        )


def outline(
    settings: Settings, architecture: Architecture, *, world: int | None, machine: Machine | None = None
) -> Outline:
    """What follows from settings and a model's sizes.

    Args:
        world: number of ranks that a launcher started, None where none did.
        machine: where ``parallel.auto`` chooses a layout for; None stands for what there is here.

    Raises:
        UserError: the first thing that stands in the way, or ``ConfigErrors`` with several.
    """
    check(settings)
    shape = architecture.shape
    points = expand(settings.capture.hook_points, num_layers=shape.num_layers)
    num_layers = max(1, deepest(points, shape.num_layers)) if split_of(settings.parallel).even else shape.num_layers
    max_tokens = settings.data.max_tokens or architecture.max_positions
    on_gpus = has_gpus() if machine is None else not machine.shared_cores
    work = Work(
        shape=shape,
        layers=num_layers,
        points=points,
        batch_tokens=settings.data.batch_tokens,
        max_tokens=max_tokens,
        itemsize=BYTES[settings.precision.compute],
        heads=heads_of(settings.capture.heads, shape.num_heads),
        mlp_rows=None if on_gpus else MLP_ROWS,
    )
    choice = choose(work, machine or find_machine(settings, world=world)) if settings.parallel.auto else None
    topology = asked_topology(settings.parallel, world) if choice is None else choice.topology
    problems = _problems(settings, architecture, topology)
    try:
        if settings.tokens.max_norm is not None:
            norm_point(settings.tokens, points, num_layers=shape.num_layers)
        if settings.capture.heads and not any(point.site == ATTN_WEIGHTS for point in points):
            raise ConfigError("capture.heads", "must be [] unless attn_weights are asked for", settings.capture.heads)
        if settings.tokens.pool in MEANS and any(point.site == ATTN_WEIGHTS for point in points):
            raise ConfigError("tokens.pool", "must be none or last for attn_weights", settings.tokens.pool)
    except ConfigError as problem:
        problems.append(problem)
    stages: tuple[range, ...] = ()
    try:
        stages = stages_of(num_layers, pp=topology.pp, vp=topology.vp, split=split_of(settings.parallel))
    except ConfigError as problem:
        problems.append(problem)
    raise_all(problems)
    architecture.require_length(max_tokens, "data.max_tokens")
    batching = Batching(
        max_tokens=max_tokens,
        batch_tokens=settings.data.batch_tokens,
        packing=settings.data.packing,
        multiple_of=topology.sequence_multiple,
        segment_multiple=topology.segment_multiple,
    )
    return Outline(
        settings=settings,
        architecture=architecture,
        points=points,
        topology=topology,
        stages=stages,
        work=work,
        batching=batching,
        choice=choice,
    )


def prepare(settings: Settings, *, world: int | None, for_store: bool, machine: Machine | None = None) -> Job:
    """Checks settings against the model, the data and the target folder. Writes nothing and imports no NeMo.

    Args:
        world: number of ranks that a launcher started, None where none did.
        for_store: whether the job will write a store, whose folder is then checked too.
        machine: as in ``outline``.

    Raises:
        UserError: the first thing that stands in the way, or ``ConfigErrors`` with several.
    """
    check(settings)
    folder = locate(settings.model.path)
    seen = outline(settings, read_architecture(folder), world=world, machine=machine)
    open_weights(folder, seen.architecture)
    if settings.model.adapter is not None:
        Adapter.of(settings.model.adapter, seen.architecture.shape)
    data_path = str(demo.text_path()) if settings.data.path is None else os.path.expanduser(settings.data.path)
    reads_data = settings.store.add != "hook_points"
    if reads_data:
        check_path(data_path, **_fields(settings))
    values = {each.name: getattr(seen, each.name) for each in fields(seen)}
    job = Job(**values, model_folder=folder, data_path=data_path)
    if for_store:
        check_target(job.store_path)
        if job.trace_path is not None:
            check_place(job.trace_path)
            _check_trace_apart(job, job.trace_path, reads_data=reads_data)
        if reads_data:
            _check_apart(job)
    return job


def split_of(parallel: ParallelSettings) -> Split:
    """How the settings divide the layers into stages."""
    return Split(
        first_layers=parallel.first_stage_layers,
        last_layers=parallel.last_stage_layers,
        embedding=parallel.account_for_embedding,
        loss=parallel.account_for_loss,
        layout=parallel.pipeline_layout,
    )


def _fields(settings: Settings) -> dict[str, Any]:
    """Where records hold what, as ``data.sources`` takes it."""
    data = settings.data
    return {
        "text_field": data.text_field,
        "messages_field": data.messages_field,
        "id_field": data.id_field,
        "mask_field": settings.tokens.mask_field,
    }


def asked_topology(asked: ParallelSettings, world: int | None) -> Topology:
    """The layout that the settings ask for, of the ranks that a launcher has started (None: that none has).

    Raises:
        ConfigError: they do not make one.
    """
    dp = resolve_dp(tp=asked.tp, pp=asked.pp, cp=asked.cp, dp=asked.dp, world=world)
    return Topology(tp=asked.tp, pp=asked.pp, vp=asked.vp, cp=asked.cp, dp=dp, sp=asked.sp)


def _problems(settings: Settings, architecture: Architecture, topology: Topology) -> list[UserError]:
    shape = architecture.shape
    problems = model_problems(
        topology,
        num_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
    )
    max_tokens = settings.data.max_tokens
    if max_tokens is not None and max_tokens > architecture.max_positions:
        rule = f"must be at most the model's max_position_embeddings ({architecture.max_positions})"
        problems.append(ConfigError("data.max_tokens", rule, max_tokens))
    return problems


def _check_apart(job: Job) -> None:
    """The data are listed when the run begins: neither the store nor the log may be among them."""
    store = Path(os.path.abspath(job.store_path))
    shards = [store / folder / shard_name(0) for folder in (TOKENS, str(job.points[0]))]
    documents = store / TOKENS / shard_name(0).replace(".safetensors", ".documents.jsonl")
    if any(_would_read(job.data_path, path) for path in (job.log_path, store / MARKER, documents, *shards)):
        rule = f"must lie where `data.path` ({job.data_path}) reads nothing, since all there is taken for data"
        raise ConfigError("store.path", rule, str(job.store_path))


def _check_trace_apart(job: Job, trace: Path, *, reads_data: bool) -> None:
    """In a store nothing may lie but what belongs to it."""
    store, file = Path(os.path.abspath(job.store_path)), Path(os.path.abspath(trace))
    if file == store or store in file.parents or file == job.log_path:
        rule = f"must not be the log or lie in the store ({job.store_path})"
        raise ConfigError("profile.trace", rule, str(trace))
    if reads_data and _would_read(job.data_path, file):
        rule = f"must lie where `data.path` ({job.data_path}) reads nothing, since all there is taken for data"
        raise ConfigError("profile.trace", rule, str(trace))


def _would_read(data_path: str, path: Path) -> bool:
    """Whether the file ``path``, were it there, would be one of those that ``data_path`` stands for."""
    data = Path(os.path.abspath(data_path))
    if data.is_dir():
        return data in path.parents and not any(part.startswith(".") for part in path.relative_to(data).parts)
    return path == data or (has_magic(data_path) and _matches(path.parts, data.parts))


def _matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not parts or not patterns:
        return not parts and not patterns
    if patterns[0] == "**":
        return any(_matches(parts[skipped:], patterns[1:] or ("*",)) for skipped in range(len(parts)))
    return fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
