"""What extract says, as tables, each narrow enough for 80 columns."""

from nemo_qwen_hidden.cli.terminal import Terminal, duration, human
from nemo_qwen_hidden.extract import Summary
from nemo_qwen_hidden.job import Job
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
        ("rows", f"{manifest.rows:,} tokens of {count(manifest.documents, 'document')}"),
        *([] if manifest.states == manifest.rows else [("states", f"{manifest.states:,} of {manifest.rows:,} rows")]),
        ("hook points", some([str(point) for point in manifest.points])),
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


def choice(job: Job, terminal: Terminal) -> None:
    """Why this layout, where it was chosen; at the start of ``extract``."""
    if job.choice is not None:
        terminal.note(f"layout {job.topology}, by parallel.auto; plan shows its neighbours")
        for about, reason in job.choice.reasons:
            terminal.note(f"  {about}: {reason}")


def _seconds(secs: float) -> str:
    return f"{secs:.1f} s" if secs < 60 else duration(secs)


def count(number: int, noun: str) -> str:
    """With its noun, which has no s where the number is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def some(names: list[str]) -> str:
    """All names, or the ends of a long list."""
    shown = names if len(names) <= 4 else [*names[:2], "...", names[-1]]
    return f"{len(names)}: {', '.join(shown)}" if names else "none"
