"""The settings of a run, as plain frozen values. Their YAML stands in ``conf/``; keys here and there are the same.

Units are in the names: ``_tokens``, ``_rows``. Nothing below the command line sees Hydra or OmegaConf.
"""

import math
import os
import re
from dataclasses import dataclass, field, fields

from nemo_qwen_hidden.errors import ConfigError, ConfigErrors, UserError, raise_all
from nemo_qwen_hidden.topology import Topology

DTYPES = ("fp32", "bf16", "fp16")
STORED_DTYPES = (*DTYPES, "int8")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
GATHER = ("none", "rank0")
NONFINITE = ("refuse", "keep")
ADD = ("hook_points", "documents")
KEEP = ("all", "last", "spans", "mask", "assistant")
SAMPLE_OF = ("document", "all")
RECOMPUTE = ("none", "selective", "uniform", "block")
PHASES = ("train", "validation")
POOL = ("none", "last", "mean", "weighted_mean")
MEANS = ("mean", "weighted_mean")

_SPAN = re.compile(r"(-?\d+)?:(-?\d+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """path: a Hugging Face folder or hub id, or a NeMo 2 checkpoint; None stands for the embedded demo model.

    adapter: a NeMo checkpoint of a LoRA adapter, merged into the weights. tokenizer: a folder or hub id with the
    tokenizer; None stands for the model's own.
    """

    path: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Ranks along each axis, see ``Topology``. ``dp`` None: as many replicas as fill the ranks there are, else 1.

    The rest says how layers are divided into stages where they are not divided evenly, see ``plan.stages.Split``.
    auto: the layout is chosen instead, see ``plan.auto``. memory_gb: for that, what each rank may use; None stands for
    what is there, see ``parallel.machine``.
    """

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    dp: int | None = None
    sp: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    account_for_embedding: bool = False
    account_for_loss: bool = False
    pipeline_layout: str | None = None
    auto: bool = False
    memory_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """hook_points: as ``hookpoint.expand`` takes them.

    gather: ``none``, every rank writes the rows that it holds; ``rank0``, they travel to rank 0, which writes
    them all (for ranks that share no file system). heads: attention heads whose ``attn_weights`` are taken, numbers or
    Python slices; none is all. most_attention_gb: refuse ``attn_weights`` that take more gigabytes (10**9 bytes).
    """

    hook_points: tuple[str, ...] = ("all",)
    gather: str = "none"
    heads: tuple[str, ...] = ()
    most_attention_gb: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """compute: dtype of weights and activations; stored: dtype in the store, None for the compute dtype; ``int8`` has a
    scale for each row. nonfinite: what to do with infinite values and NaN, ``refuse`` or ``keep``."""

    compute: str = "fp32"
    stored: str | None = None
    nonfinite: str = "refuse"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """path: a file, folder, glob, or a folder saved by ``datasets``; None stands for the embedded text.

    max_tokens: longer documents are run as consecutive windows of this many tokens, each from position 0; None
    stands for the model's ``max_position_embeddings``. batch_tokens: tokens in one microbatch, padding included,
    unless a single document is longer. packing: documents laid end to end with attention kept within each,
    instead of a padded batch. text_field, messages_field, id_field: names in JSONL and Parquet.
    """

    path: str | None = None
    max_tokens: int | None = None
    batch_tokens: int = 4096
    packing: bool = True
    text_field: str = "text"
    messages_field: str = "messages"
    id_field: str = "id"


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """Which tokens' states are kept, chosen before anything is copied; ``docs/tokens.md`` defines each. All that is
    asked for has to hold of a token; positions count from the beginning of a document. Sampling comes after the other
    choices, and norms are looked at last.

    keep: ``all``; ``last``, the last token of each document; ``spans``; ``mask``, what ``mask_field`` of its record
    marks; ``assistant``, what the assistant says in chats. every: positions that this divides. spans: ``start:stop`` in
    each document, as a Python slice. special, first: whether special tokens, and the first token of a document, may be
    kept. sample: tokens drawn at random of each document, or of ``all`` together. pool: one vector for each document
    instead, over its kept tokens. max_norm: rows whose norm is above this multiple of the running median of norms at
    the hook point ``max_norm_at`` are left out; None is the deepest point of the residual stream that is asked for.
    """

    keep: str = "all"
    every: int = 1
    spans: tuple[str, ...] = ()
    mask_field: str | None = None
    special: bool = True
    first: bool = True
    sample: int | None = None
    sample_of: str = "document"
    seed: int = 0
    pool: str = "none"
    max_norm: float | None = None
    max_norm_at: str | None = None

    @property
    def slices(self) -> tuple[slice, ...]:
        """``spans`` as slices over the positions of a document.

        Raises:
            ConfigError: not of the form ``start:stop``, or none of whose positions could be in any document.
        """
        return tuple(map(_slice, self.spans))


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """path: the folder to make, or to go on with. shard_rows: rows in one shard file. overwrite: replace an earlier
    store there. add: ``hook_points`` over the rows of a finished store, or ``documents`` at its end.

    commit_secs: what was computed is made durable after this long, so that a crash costs no more than that.
    """

    path: str | None = None
    shard_rows: int = 65536
    overwrite: bool = False
    add: str | None = None
    commit_secs: float = 10.0


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """threads: CPU threads of each rank; None shares the machine's cores among its ranks."""

    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """trace: a file for what each rank does when, see ``docs/profiling.md``; None records nothing."""

    trace: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tokens: TokenSettings = field(default_factory=TokenSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)

    @property
    def stored_dtype(self) -> str:
        """``precision.stored``, or the compute dtype where none was chosen."""
        return self.precision.stored or self.precision.compute


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is fine-tuned.

    lr falls to ``min_lr`` by a cosine over ``max_steps``, after ``warmup_steps`` of rising from 0. seq_length: tokens
    of a sequence. validation_part: of the documents, the last ones. validation_every, checkpoint_every: steps.
    validation_batches: global batches of one validation; None for all. keep_checkpoints: of those before the last.
    recompute: what is computed again in the backward pass instead of kept: ``none``; ``selective``, the core of
    attention; ``uniform``, all layers, ``recompute_layers`` at a time; ``block``, the first ``recompute_layers`` of
    each stage. lora_dim: rank of a LoRA that is trained on the linears of every layer instead of the weights, with
    NeMo's defaults for the rest; None: all weights are. seed: of the order of the data. log_every: steps between lines
    of progress.
    """

    max_steps: int = 100
    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    global_batch_size: int = 8
    micro_batch_size: int = 1
    seq_length: int = 256
    validation_part: float = 0.05
    validation_every: int = 50
    validation_batches: int | None = 4
    checkpoint_every: int = 50
    keep_checkpoints: int = 0
    recompute: str = "none"
    recompute_layers: int = 1
    lora_dim: int | None = None
    seed: int = 0
    log_every: int = 10


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """path: the folder of a fine-tuning run, new or one to go on with: checkpoints, TensorBoard's events, logs."""

    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """Which hidden states of a run are captured while it trains; where is ``capture.hook_points``.

    store: the folder of the store for states of the run's own samples; None captures none. phases: of ``train`` and
    ``validation``. probe_store: the folder of the store for states of the same documents after every so many steps;
    None runs none. probe_data: these documents, as ``data.path``; None stands for the embedded text. probe_documents:
    the first so many; None for all. probe_labels: what a linear probe tells apart in the drift that is logged, a field
    of their records or ``repeated``; None trains none. every: steps between captures, of both kinds.
    """

    store: str | None = None
    every: int = 10
    phases: tuple[str, ...] = ("train",)
    probe_store: str | None = None
    probe_data: str | None = None
    probe_documents: int | None = None
    probe_labels: str | None = "repeated"


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """One fine-tuning run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    run: RunSettings = field(default_factory=RunSettings)
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)


def check_finetuning(settings: FinetuneSettings) -> None:
    """Checks what can be checked from the settings alone.

    Raises:
        UserError: one problem, or ``ConfigErrors`` with all of them.
    """
    train, problems = settings.train, list[UserError]()
    if train.recompute not in RECOMPUTE:
        problems.append(ConfigError("train.recompute", f"must be one of {', '.join(RECOMPUTE)}", train.recompute))
    least = dict.fromkeys(("warmup_steps", "keep_checkpoints", "seed", "lr", "min_lr", "weight_decay", "clip_grad"), 0)
    least |= dict.fromkeys(("max_steps", "global_batch_size", "micro_batch_size", "seq_length", "validation_every"), 1)
    least |= dict.fromkeys(("validation_batches", "checkpoint_every", "recompute_layers", "lora_dim", "log_every"), 1)
    for name, bound in least.items():
        value = getattr(train, name)
        if value is not None and not bound <= value < math.inf:  # nor NaN
            problems.append(ConfigError(f"train.{name}", f"must be at least {bound}", value))
    if train.min_lr > train.lr:
        problems.append(ConfigError("train.min_lr", f"must be at most `train.lr` ({train.lr})", train.min_lr))
    if train.seed >= 2**32:
        problems.append(ConfigError("train.seed", "must be below 2**32", train.seed))
    if not 0 <= train.validation_part < 1:
        rule = "must be at least 0, for no validation, and below 1"
        problems.append(ConfigError("train.validation_part", rule, train.validation_part))
    if train.recompute_layers != 1 and train.recompute not in ("uniform", "block"):
        rule = "must be 1 unless `train.recompute` is uniform or block"
        problems.append(ConfigError("train.recompute_layers", rule, train.recompute_layers))
    if settings.precision.compute == "fp16":
        rule = "must be fp32 or bf16 for training: fp16 would need its loss scaled"
        problems.append(ConfigError("precision.compute", rule, "fp16"))
    for name in ("every", "probe_documents"):
        if (value := getattr(settings.watch, name)) is not None and value < 1:
            problems.append(ConfigError(f"watch.{name}", "must be at least 1", value))
    problems += _watch_problems(settings.watch, train)
    if settings.parallel.auto:
        problems.append(ConfigError("parallel.auto", "must be false for training, whose layout you choose", True))
    try:
        shared = {each.name: getattr(settings, each.name) for each in fields(Settings) if hasattr(settings, each.name)}
        check(Settings(**shared))
    except ConfigErrors as several:
        problems += several.problems
    except UserError as problem:
        problems.append(problem)
    raise_all(problems)


def _watch_problems(watch: WatchSettings, train: TrainSettings) -> list[UserError]:
    problems: list[UserError] = []
    one, other = (path and os.path.realpath(os.path.expanduser(path)) for path in (watch.store, watch.probe_store))
    if one is not None and one == other:
        problems.append(
            ConfigError("watch.probe_store", "must be another folder than `watch.store`", watch.probe_store)
        )
    for name in ("probe_data", "probe_documents"):
        if (given := getattr(watch, name)) is not None and watch.probe_store is None:
            rule = "must be null where `watch.probe_store` names no folder for their states"
            problems.append(ConfigError(f"watch.{name}", rule, given))
    if not watch.phases or not set(watch.phases) <= set(PHASES):
        problems.append(ConfigError("watch.phases", f"must hold {' or '.join(PHASES)}", watch.phases))
    elif "validation" in watch.phases and watch.store is not None and not train.validation_part:
        rule = "must leave out validation where there is none (`train.validation_part` 0)"
        problems.append(ConfigError("watch.phases", rule, watch.phases))
    elif "validation" in watch.phases and watch.store is not None and min(watch.every, train.validation_every) >= 1:
        between = min(train.validation_every, train.max_steps)
        if math.lcm(watch.every, between) > train.max_steps:
            rule = f"must divide the number of a step with validation, which is every {between}"
            problems.append(ConfigError("watch.every", f"{rule} of {train.max_steps}", watch.every))
    return problems


def check(settings: Settings) -> None:
    """Checks what can be checked from the settings alone.

    Raises:
        UserError: one problem, or ``ConfigErrors`` with all of them.
    """
    problems: list[UserError] = []
    choices = (
        ("precision.compute", settings.precision.compute, DTYPES),
        ("precision.stored", settings.precision.stored, STORED_DTYPES),
        ("precision.nonfinite", settings.precision.nonfinite, NONFINITE),
        ("store.add", settings.store.add, ADD),
        ("capture.gather", settings.capture.gather, GATHER),
        ("tokens.keep", settings.tokens.keep, KEEP),
        ("tokens.sample_of", settings.tokens.sample_of, SAMPLE_OF),
        ("tokens.pool", settings.tokens.pool, POOL),
    )
    for setting, value, allowed in choices:
        if value is not None and value not in allowed:
            problems.append(ConfigError(setting, f"must be one of {', '.join(allowed)}", value))
    sizes = (
        ("data.max_tokens", settings.data.max_tokens),
        ("data.batch_tokens", settings.data.batch_tokens),
        ("tokens.every", settings.tokens.every),
        ("tokens.sample", settings.tokens.sample),
        ("store.shard_rows", settings.store.shard_rows),
        ("runtime.threads", settings.runtime.threads),
    )
    for setting, size in sizes:
        if size is not None and size < 1:
            problems.append(ConfigError(setting, "must be at least 1", size))
    amounts = (
        ("capture.most_attention_gb", settings.capture.most_attention_gb),
        ("store.commit_secs", settings.store.commit_secs),
    )
    for setting, amount in amounts:
        if not amount >= 0:  # nor NaN, above which nothing is
            problems.append(ConfigError(setting, "must be at least 0", amount))
    if settings.store.add is not None and settings.store.overwrite:
        problems.append(ConfigError("store.overwrite", "must be false where `store.add` adds to a store", True))
    problems += _token_problems(settings.tokens)
    problems += _automatic_problems(settings.parallel)
    try:
        parallel = settings.parallel
        Topology(
            tp=parallel.tp,
            pp=parallel.pp,
            vp=parallel.vp,
            cp=parallel.cp,
            dp=1 if parallel.dp is None else parallel.dp,
            sp=parallel.sp,
        )
    except ConfigError as problem:
        problems.append(problem)
    raise_all(problems)


def check_tokens(tokens: TokenSettings) -> None:
    """Checks a choice of tokens alone, as ``check`` does for a whole run.

    Raises:
        UserError: one problem, or ``ConfigErrors`` with all of them.
    """
    check(Settings(tokens=tokens))


def _token_problems(tokens: TokenSettings) -> list[UserError]:
    problems: list[UserError] = []
    for setting, given, keep in (("spans", tokens.spans, "spans"), ("mask_field", tokens.mask_field, "mask")):
        if bool(given) != (tokens.keep == keep):
            rule = f"must be given where `tokens.keep` is {keep}, and only there"
            problems.append(ConfigError(f"tokens.{setting}", rule, given))
    for span in tokens.spans:
        try:
            _slice(span)
        except ConfigError as problem:
            problems.append(problem)
    if not 0 <= tokens.seed < 2**64:
        problems.append(ConfigError("tokens.seed", "must be from 0 to 2**64 - 1", tokens.seed))
    if tokens.sample is None and tokens.sample_of != "document":
        rule = "must be document where `tokens.sample` gives no number of tokens to draw"
        problems.append(ConfigError("tokens.sample_of", rule, tokens.sample_of))
    if tokens.max_norm is not None and not (tokens.max_norm > 0 and math.isfinite(tokens.max_norm)):
        problems.append(ConfigError("tokens.max_norm", "must be a number above 0", tokens.max_norm))
    if tokens.max_norm is not None and tokens.pool != "none":
        rule = "must be null where `tokens.pool` makes one vector of a document's kept tokens"
        problems.append(ConfigError("tokens.max_norm", rule, tokens.max_norm))
    if tokens.max_norm is None and tokens.max_norm_at is not None:
        rule = "must be null where `tokens.max_norm` leaves nothing out"
        problems.append(ConfigError("tokens.max_norm_at", rule, tokens.max_norm_at))
    return problems


def _slice(span: str) -> slice:
    match = _SPAN.fullmatch(span)
    if match is None:
        rule = 'must hold slices `start:stop` of positions, such as "0:4" or "-3:", in YAML in quotes'
        raise ConfigError("tokens.spans", rule, span)
    start, stop = (None if number is None else int(number) for number in match.groups())
    # Of one sign, the two can be compared; of two, it depends on the document.
    low = 0 if start is None else start
    if stop is not None and (stop == 0 or (low >= stop and (low < 0) == (stop < 0))):
        raise ConfigError("tokens.spans", "must hold slices with a position in them", span)
    return slice(start, stop)


def _automatic_problems(parallel: ParallelSettings) -> list[UserError]:
    if not parallel.auto:
        rule = "must be left out where `parallel.auto` is false"
        return [] if parallel.memory_gb is None else [ConfigError("parallel.memory_gb", rule, parallel.memory_gb)]
    problems: list[UserError] = []
    for each in fields(parallel):
        if each.name not in ("auto", "memory_gb") and getattr(parallel, each.name) != each.default:
            rule = "must be left out where `parallel.auto` chooses the layout"
            problems.append(ConfigError(f"parallel.{each.name}", rule, getattr(parallel, each.name)))
    if parallel.memory_gb is not None and not 0 < parallel.memory_gb < math.inf:
        problems.append(ConfigError("parallel.memory_gb", "must be above 0", parallel.memory_gb))
    return problems
