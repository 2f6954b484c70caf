"""The settings of a run, as plain frozen values. Their YAML stands in ``conf/``; keys here and there are the same.

Units are in the names: ``_tokens``, ``_rows``. Nothing below the command line sees Hydra or OmegaConf.
"""

from dataclasses import dataclass, field

from nemo_qwen_hidden.errors import ConfigError, UserError, raise_all
from nemo_qwen_hidden.topology import Topology

DTYPES = ("fp32", "bf16", "fp16")
STORED_DTYPES = (*DTYPES, "int8")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
GATHER = ("none", "rank0")
NONFINITE = ("refuse", "keep")
ADD = ("hook_points", "documents")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """path: a Hugging Face folder or hub id; None stands for the embedded demo model."""

    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Ranks along each axis, see ``Topology``. ``dp`` None: as many replicas as fill the ranks there are, else 1.

    The rest says how layers are divided into stages where they are not divided evenly, see ``plan.stages.Split``.
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


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """hook_points: as ``hookpoint.expand`` takes them.

    gather: ``none``, every rank writes the rows that it holds; ``rank0``, they travel to rank 0, which writes
    them all (for ranks that share no file system).
    """

    hook_points: tuple[str, ...] = ("all",)
    gather: str = "none"


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
    instead of a padded batch. text_field, id_field: names in JSONL and Parquet.
    """

    path: str | None = None
    max_tokens: int | None = None
    batch_tokens: int = 4096
    packing: bool = True
    text_field: str = "text"
    id_field: str = "id"


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
class Settings:
    """One run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)

    @property
    def stored_dtype(self) -> str:
        """``precision.stored``, or the compute dtype where none was chosen."""
        return self.precision.stored or self.precision.compute


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
    )
    for setting, value, allowed in choices:
        if value is not None and value not in allowed:
            problems.append(ConfigError(setting, f"must be one of {', '.join(allowed)}", value))
    sizes = (
        ("data.max_tokens", settings.data.max_tokens),
        ("data.batch_tokens", settings.data.batch_tokens),
        ("store.shard_rows", settings.store.shard_rows),
        ("runtime.threads", settings.runtime.threads),
    )
    for setting, size in sizes:
        if size is not None and size < 1:
            problems.append(ConfigError(setting, "must be at least 1", size))
    if settings.store.commit_secs < 0:
        problems.append(ConfigError("store.commit_secs", "must be at least 0", settings.store.commit_secs))
    if settings.store.add is not None and settings.store.overwrite:
        problems.append(ConfigError("store.overwrite", "must be false where `store.add` adds to a store", True))
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
