"""What extract and plan say, as tables, each narrow enough for 80 columns."""

from nemo_qwen_hidden.cli.terminal import Terminal, duration, human
from nemo_qwen_hidden.config import MEANS
from nemo_qwen_hidden.data.tokenize import require_tokens
from nemo_qwen_hidden.extract import Summary, disk_bytes
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.part import state_counts
from nemo_qwen_hidden.plan.auto import Choice
from nemo_qwen_hidden.plan.pooling import check_whole
from nemo_qwen_hidden.store.format import human_bytes
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.trace.shares import NAMES, shares

Facts = list[tuple[str, str]]


def summary(done: Summary, terminal: Terminal) -> None:
    """What was made, at the end of ``extract``."""
    manifest = done.manifest
    size = sum(file.bytes for file in manifest.files())
    facts = [
        ("store", str(done.path)),
        ("rows", f"{manifest.rows:,} tokens of {_count(manifest.documents, 'document')}"),
        *([] if manifest.states == manifest.rows else [("states", f"{manifest.states:,} of {manifest.rows:,} rows")]),
        ("hook points", _some([str(point) for point in manifest.points])),
        ("size", f"{human_bytes(size)} in {manifest.stored_dtype}, {_widths(manifest)} values a row"),
    ]
    if done.work is None:
        terminal.table(facts, "already there; nothing was left to do")
        return
    speed = human(done.states / done.run_seconds) if done.run_seconds > 0 else "-"
    full = manifest.states == manifest.rows
    made, unit = ("tokens run", "tokens") if full else ("states made", "states")
    facts += [
        ("layout", done.topology),
        ("time", f"{_seconds(done.seconds)}, of which {_seconds(done.run_seconds)} computing and writing"),
        ("speed", f"{done.states:,} {made}, {speed} {unit}/s"),
        ("peak memory", f"{human_bytes(done.peak_bytes)} in the largest rank"),
    ]
    terminal.table(facts, f"extracted: {done.work}")


def trace(job: Job, done: Summary, terminal: Terminal) -> None:
    """What the ranks spent their time on, where ``profile.trace`` asked for it and there was something to do."""
    if job.trace_path is None or done.work is None:
        return
    header = ("rank", "time", *NAMES)
    rows = [
        (each.label, _seconds(each.secs), *(f"{100 * share:.1f}" for share in each.shares.values()))
        for each in shares(job.trace_path)
    ]
    if rows:  # else what was left to do was to finish shards
        terminal.grid(header, rows, "percent of the time while running (peer, disk: waiting)")
    terminal.line(f"trace in {job.trace_path}: ui.perfetto.dev opens it")


def _widths(manifest: Manifest) -> str:
    """Of the states, the smallest and the largest where they differ."""
    widths = sorted({entry.width for entry in manifest.hook_points})
    return " to ".join(f"{width:,}" for width in dict.fromkeys((widths[0], widths[-1])))


def plan(job: Job, terminal: Terminal) -> None:
    """What ``extract`` would do. Tokenizes the data to count its rows; loads no weights."""
    documents = rows = windows = states = cut_documents = 0
    with terminal.progress() as bar:
        for length, cut, kept in state_counts(job):
            documents, rows, windows, states = documents + 1, rows + length, windows + cut, states + kept
            cut_documents += cut > 1
            bar.count(rows)
    require_tokens(rows, job.data_path)
    check_whole(job.settings.tokens.pool, cut_documents=cut_documents, max_tokens=job.batching.max_tokens)
    sample, tokens = job.settings.tokens.sample, job.settings.tokens
    if sample is not None and tokens.sample_of == "all" and tokens.pool not in MEANS:
        states = min(states, sample)
    facts = _plan_rows(job, documents=documents, rows=rows, windows=windows, states=states)
    terminal.table(facts, "plan")
    if job.choice is not None:
        terminal.table(job.choice.reasons, "why this layout")
        terminal.grid(("instead", "a rank", "time", "why not"), _instead_rows(job.choice), "its neighbours")
    terminal.grid(
        ("stage", "layers", "hook points", "weights", "while it runs"), _stage_rows(job), "each rank of a stage"
    )


def choice(job: Job, terminal: Terminal) -> None:
    """Why this layout, where it was chosen; at the start of ``extract``."""
    if job.choice is not None:
        terminal.note(f"layout {job.topology}, by parallel.auto; plan shows its neighbours")
        for about, reason in job.choice.reasons:
            terminal.note(f"  {about}: {reason}")


def _instead_rows(choice: Choice) -> list[tuple[str, ...]]:
    return [
        (
            str(each.topology),
            "-" if each.need_bytes is None else human_bytes(each.need_bytes),
            "-" if each.times is None else f"x {each.times:.2f}",
            each.why,
        )
        for each in choice.rejected
    ]


def _plan_rows(job: Job, *, documents: int, rows: int, windows: int, states: int) -> Facts:
    settings, shape = job.settings, job.architecture.shape
    shards = -(-states // settings.store.shard_rows)
    chosen = [] if states == rows else [("kept", _kept(job, states))]
    of_each = f"{shards:,} a hook point, of up to {settings.store.shard_rows:,} rows"
    return [
        ("model", str(job.model_folder)),
        ("layers", f"{job.num_layers} of {shape.num_layers} are run, in {settings.precision.compute}"),
        ("data", job.data_path),
        ("rows", f"{rows:,} tokens of {_count(documents, 'document')}"),
        *chosen,
        ("windows", f"{windows:,} of at most {job.batching.max_tokens:,} tokens"),
        ("hook points", _some([str(point) for point in job.points])),
        ("layout", f"{job.topology}: {_count(job.topology.world, 'rank')}"),
        ("shards", f"{shards * len(job.points):,}: {of_each}"),
        ("on disk", f"{human_bytes(disk_bytes(job, rows=rows, states=states))} in {settings.stored_dtype}"),
    ]


def _kept(job: Job, states: int) -> str:
    tokens = job.settings.tokens
    less = ", less those left out for their norm" if tokens.max_norm is not None else ""
    return _count(states, "mean" if tokens.pool in MEANS else "token") + less


def _stage_rows(job: Job) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for stage, layers in enumerate(job.stages):
        need = job.rank_bytes(stage)
        rows.append(
            (
                str(stage) if job.topology.vp == 1 else f"{stage}, rank {stage % job.topology.pp}",
                f"{layers.start} to {layers.stop - 1}" if layers else "none",
                _some([str(point) for point in job.points_of(stage)]),
                human_bytes(need.weights),
                f"up to {human_bytes(need.activations + need.states)}",
            )
        )
    return rows


def _seconds(secs: float) -> str:
    return f"{secs:.1f} s" if secs < 60 else duration(secs)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _some(names: list[str]) -> str:
    """All names, or the ends of a long list."""
    shown = names if len(names) <= 4 else [*names[:2], "...", names[-1]]
    return f"{len(names)}: {', '.join(shown)}" if names else "none"
