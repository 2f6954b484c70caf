"""Results as tables, each narrow enough for 80 columns. Readers and tokenizers are imported where they are used."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_qwen_hidden.cli.terminal import Terminal, duration, human
from nemo_qwen_hidden.data.sources import read_documents
from nemo_qwen_hidden.data.tokenize import require_tokens, tokenize
from nemo_qwen_hidden.data.tokenizer import load_tokenizer
from nemo_qwen_hidden.extract import Summary, disk_bytes
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.store.format import ShardGrid, human_bytes

if TYPE_CHECKING:
    from nemo_qwen_hidden.store.reader import Store

SHOWN_ROWS = 8
Facts = list[tuple[str, str]]


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
        ("size", f"{human_bytes(size)} in {manifest.stored_dtype}, {manifest.hidden_size:,} values a row"),
        ("layout", done.topology),
        ("time", f"{_seconds(done.seconds)}, of which {_seconds(done.run_seconds)} computing and writing"),
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
    terminal.table(_plan_rows(job, documents=documents, rows=rows, windows=windows), "plan")
    terminal.grid(
        ("stage", "layers", "hook points", "weights", "activations"), _stage_rows(job), "each rank of a stage"
    )


def store(opened: "Store", terminal: Terminal) -> None:
    """What is in a store, on one screen; ``inspect --json`` has the rest."""
    from nemo_qwen_hidden.store.describe import as_dict

    described = as_dict(opened)
    terminal.table(_size_facts(described) + _origin_facts(described), "store")
    header = ("hook point", "HF hidden_states", "taken", "size")
    terminal.grid(header, _ends([_hook_point_row(point) for point in described["hook_points"]]), "hook points")


def _plan_rows(job: Job, *, documents: int, rows: int, windows: int) -> Facts:
    settings, shape = job.settings, job.architecture.shape
    shards = ShardGrid(rows=rows, shard_rows=settings.store.shard_rows).shards
    of_each = f"{shards:,} a hook point, of up to {settings.store.shard_rows:,} rows"
    return [
        ("model", str(job.model_folder)),
        ("layers", f"{job.num_layers} of {shape.num_layers} are run, in {settings.precision.compute}"),
        ("data", job.data_path),
        ("rows", f"{rows:,} tokens of {documents:,} documents"),
        ("windows", f"{windows:,} of at most {job.batching.max_tokens:,} tokens"),
        ("hook points", _some([str(point) for point in job.points])),
        ("layout", f"{job.topology}: {_count(job.topology.world, 'rank')}"),
        ("shards", f"{shards * len(job.points):,}: {of_each}"),
        ("on disk", f"{human_bytes(disk_bytes(job, rows))} in {settings.stored_dtype}"),
    ]


def _stage_rows(job: Job) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for stage, layers in enumerate(job.stages):
        weights, activations = job.rank_bytes(stage)
        rows.append(
            (
                str(stage),
                f"{layers.start} to {layers.stop - 1}",
                _some([str(point) for point in job.points_of(stage)]),
                human_bytes(weights),
                f"up to {human_bytes(activations)}",
            )
        )
    return rows


def _size_facts(described: Mapping[str, Any]) -> Facts:
    dtypes = described["dtypes"]
    shards = f"{described['shards']:,} a hook point, of up to {described['shard_rows']:,} rows"
    return [
        ("path", described["path"]),
        ("rows", f"{described['rows']:,} tokens of {described['documents']:,} documents"),
        ("hidden size", f"{described['hidden_size']:,}"),
        ("hook points", f"{len(described['hook_points']):,}"),
        ("dtype", f"{dtypes['stored']} stored, {dtypes['compute']} computed"),
        ("shards", shards),
        ("size", human_bytes(described["bytes"])),
    ]


def _origin_facts(described: Mapping[str, Any]) -> Facts:
    """Provenance, as far as the manifest has it: it belongs to whoever made the store."""
    model, data, producer = described["model"], described["data"], described["producer"]
    config, layout, command = model.get("config") or {}, producer.get("layout"), producer.get("command")
    started = producer.get("started_unix_secs")
    facts = {
        "model": model.get("path"),
        "architecture": _architecture(config) if config else None,
        "data": data.get("path"),
        "data sha256": _short(data.get("sha256")),
        "tokenizer": _short(described["tokenizer"].get("sha256")),
        "windows": data.get("max_tokens") and f"of at most {data['max_tokens']:,} tokens",
        "layout": layout and " ".join(f"{axis}={str(size).lower()}" for axis, size in layout.items()),
        "versions": ", ".join(f"{name} {number}" for name, number in (producer.get("versions") or {}).items()),
        "begun": started and datetime.fromtimestamp(started).astimezone().isoformat(" ", "seconds"),
        "command": command and _command([str(argument) for argument in command]),
    }
    return [(label, str(value)) for label, value in facts.items() if value]


def _hook_point_row(point: Mapping[str, Any]) -> tuple[str, ...]:
    index = point["huggingface_index"]
    return (
        point["name"],
        "-" if index is None else f"[{index}]",
        f"{point['norm']} the final norm",
        human_bytes(point["bytes"]),
    )


def _command(arguments: Sequence[str]) -> str:
    """As it would be typed."""
    module = Path(arguments[0]).parts[-2:] == ("nemo_qwen_hidden", "__main__.py")
    return shlex.join(["python", "-m", "nemo_qwen_hidden", *arguments[1:]] if module else arguments)


def _architecture(config: Mapping[str, Any]) -> str:
    """Sizes that people know a model by."""
    named = (
        ("layers", "num_hidden_layers"),
        ("hidden", "hidden_size"),
        ("heads", "num_attention_heads"),
        ("key/value heads", "num_key_value_heads"),
        ("vocabulary", "vocab_size"),
    )
    sizes = [f"{label} {config[field]}" for label, field in named if field in config]
    return ", ".join([str(config.get("model_type", "unknown type")), *sizes])


def _short(digest: object) -> str | None:
    return f"{str(digest)[:12]}..." if digest else None


def _seconds(secs: float) -> str:
    return f"{secs:.1f} s" if secs < 60 else duration(secs)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _some(names: list[str]) -> str:
    """All names, or the ends of a long list."""
    shown = names if len(names) <= 4 else [*names[:2], "...", names[-1]]
    return f"{len(names)}: {', '.join(shown)}" if names else "none"


def _ends(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """All rows, or both ends of a long table."""
    if len(rows) <= SHOWN_ROWS:
        return rows
    half = SHOWN_ROWS // 2
    gap = (f"... {len(rows) - 2 * half} more", *[""] * (len(rows[0]) - 1))
    return [*rows[:half], gap, *rows[-half:]]
