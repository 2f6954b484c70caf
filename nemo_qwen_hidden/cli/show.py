"""Results as tables."""

from nemo_qwen_hidden.cli.terminal import Terminal, human
from nemo_qwen_hidden.data.sources import read_documents
from nemo_qwen_hidden.data.tokenize import require_tokens, tokenize
from nemo_qwen_hidden.data.tokenizer import load_tokenizer
from nemo_qwen_hidden.extract import Summary, disk_bytes
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.store.describe import describe, hook_point_lines
from nemo_qwen_hidden.store.format import ShardGrid, human_bytes
from nemo_qwen_hidden.store.reader import Store


def summary(done: Summary, terminal: Terminal) -> None:
    """What was made, at the end of ``extract``."""
    manifest = done.manifest
    points = [str(entry.point) for entry in manifest.hook_points]
    size = sum(shard.bytes for entry in manifest.hook_points for shard in entry.shards)
    speed = human(manifest.rows / done.run_seconds) if done.run_seconds > 0 else "-"
    rows = (
        ("store", str(done.path)),
        ("rows", f"{manifest.rows:,} tokens of {manifest.documents:,} documents"),
        ("hook points", _some(points)),
        ("size", f"{human_bytes(size)} in {manifest.stored_dtype}, {manifest.hidden_size} values a row"),
        ("layout", done.topology),
        ("time", f"{done.seconds:.1f} s, of which {done.run_seconds:.1f} s computing and writing"),
        ("speed", f"{speed} tokens/s"),
        ("peak memory", f"{human_bytes(done.peak_bytes)} in the largest rank"),
    )
    terminal.table(rows, "extracted")


def plan(job: Job, terminal: Terminal) -> None:
    """What ``extract`` would do. Tokenizes the data to count its rows; loads no weights."""
    documents = rows = windows = 0
    stream = read_documents(job.data_path, text_field=job.settings.data.text_field, id_field=job.settings.data.id_field)
    vocab_size = job.architecture.shape.vocab_size
    with terminal.progress() as bar:
        for document in tokenize(stream, lambda: load_tokenizer(job.model_folder), vocab_size=vocab_size):
            documents, rows = documents + 1, rows + len(document.token_ids)
            windows += -(-len(document.token_ids) // job.batching.max_tokens)
            bar.count(rows)
    require_tokens(rows, job.data_path)
    shards = ShardGrid(rows=rows, shard_rows=job.settings.store.shard_rows).shards * len(job.points)
    terminal.table(_plan_rows(job, documents=documents, rows=rows, windows=windows, shards=shards), "plan")
    terminal.grid(
        ("stage", "layers", "hook points", "weights", "activations"), _stage_rows(job), "each rank of a stage"
    )


def store(opened: Store, terminal: Terminal) -> None:
    """What is in a store."""
    terminal.table(describe(opened), "store")
    lines = (
        (
            line.name,
            "-" if line.huggingface_index is None else str(line.huggingface_index),
            line.norm,
            human_bytes(line.bytes),
            line.meaning,
        )
        for line in hook_point_lines(opened)
    )
    terminal.grid(("hook point", "HF index", "norm", "size", "meaning"), lines, "hook points")


def _plan_rows(job: Job, *, documents: int, rows: int, windows: int, shards: int) -> list[tuple[str, str]]:
    total = job.architecture.shape.num_layers
    return [
        ("model", f"{job.model_folder} ({job.num_layers} of {total} layers run, {job.settings.precision.compute})"),
        ("data", job.data_path),
        (
            "rows",
            f"{rows:,} tokens of {documents:,} documents in {windows:,} windows of at most {job.batching.max_tokens}",
        ),
        ("layout", f"{job.topology}: {job.topology.world} ranks"),
        ("hook points", _some([str(point) for point in job.points])),
        ("shards", f"{shards:,} of {job.settings.store.shard_rows:,} rows"),
        ("on disk", f"{human_bytes(disk_bytes(job, rows))} in {job.settings.stored_dtype}"),
    ]


def _stage_rows(job: Job) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for stage, layers in enumerate(job.stages):
        weights, activations = job.rank_bytes(stage)
        points: tuple[HookPoint, ...] = job.points_of(stage)
        rows.append(
            (
                str(stage),
                f"{layers.start} to {layers.stop - 1}",
                _some([str(point) for point in points]),
                human_bytes(weights),
                f"up to {human_bytes(activations)}",
            )
        )
    return rows


def _some(names: list[str]) -> str:
    """All names, or the ends of a long list."""
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-2:]]
    return f"{len(names)}: {', '.join(shown)}" if names else "none"
