"""What the commands on stores say, as tables, each narrow enough for 80 columns."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_qwen_hidden.cli.terminal import Terminal
from nemo_qwen_hidden.store.format import human_bytes

if TYPE_CHECKING:
    from nemo_qwen_hidden.store.read.reader import Store
    from nemo_qwen_hidden.store.upkeep.export import Exported
    from nemo_qwen_hidden.store.upkeep.merge import Merged
    from nemo_qwen_hidden.store.upkeep.repair import Repair
    from nemo_qwen_hidden.store.upkeep.verify import Report

SHOWN_ROWS = 8
SHOWN_FINDINGS = 20
Facts = list[tuple[str, str]]


def store(opened: "Store", terminal: Terminal) -> None:
    """What is in a store, on one screen; ``inspect --json`` has the rest."""
    from nemo_qwen_hidden.store.read.describe import as_dict
    from nemo_qwen_hidden.store.upkeep.summary import files, unfinished, value_lines

    described = as_dict(opened)
    facts = _size_facts(described, files(opened)) + _origin_facts(described)
    job = unfinished(opened)
    terminal.table(facts if job is None else [*facts, ("unfinished", job)], "store")
    if described["steps"]:
        terminal.grid(("phase", "steps", "", "rows", "samples"), _step_rows(described["steps"]), "captured steps")
    elif len(described["parts"]) > 1:
        terminal.grid(("part", "rows", "documents", "shards of", "data"), _ends(_part_rows(described)), "parts")
    if len(described["producers"]) > 1:
        terminal.grid(("job", "begun", "layout"), _ends(_job_rows(described)), "jobs")
    points = described["hook_points"]
    header = ("hook point", "state", "HF hidden_states", "taken", "size")
    terminal.grid(header, _ends([_hook_point_row(point) for point in points]), "hook points")
    known = {line.name: line for line in value_lines(opened, [point["name"] for point in _shown(points)])}
    rows = [_value_row(point, known[point["name"]]) if point["name"] in known else () for point in points]
    columns = ("hook point", "rms", "largest", "norm", "max norm", "NaN, inf", "error", "max error")
    terminal.grid(columns, _ends(rows), "values (norm: median of rows; error: of rows by storing, rms)")


def verified(report: "Report", terminal: Terminal) -> None:
    """What a verification found."""
    terminal.table(_verified_facts(report), "damaged" if report.findings else "verified")
    if report.findings:
        rows = [(finding.file, _rows(finding.rows), finding.what) for finding in report.findings[:SHOWN_FINDINGS]]
        left = len(report.findings) - len(rows)
        more = [(f"... {left} more (--json has all)", "", "")] if left else []
        terminal.grid(("file", "rows", "what is wrong"), [*rows, *more], "findings")


def repaired(done: "Repair", terminal: Terminal) -> None:
    """What a repair dropped, and what to run now."""
    terminal.table(_verified_facts(done.found), "repaired" if done.found.findings else "verified")
    if not done.found.findings:
        terminal.line("nothing to repair")
        return
    dropped = [
        (f"{point}/{shard:06d}.safetensors", _rows(_rows_of(done, point, shard))) for point, shard in done.shards
    ]
    terminal.grid(("file", "rows"), [*dropped, *((file, "-") for file in done.files)], "dropped")
    if done.command is None:
        terminal.line("\nThe store is unfinished now. The job that made it, run again, makes these anew.")
    else:
        terminal.line("\nThe store is unfinished now. To make these anew and nothing else:")
        terminal.line(f"  {command_line(done.command)}")


def merged(done: "Merged", terminal: Terminal) -> None:
    """What a merge made."""
    manifest = done.manifest
    there = not (done.linked or done.copied)
    facts = [
        ("store", str(done.path)),
        ("rows", f"{manifest.rows:,} tokens of {manifest.documents:,} documents in {len(manifest.parts)} parts"),
        *_kept_facts(manifest.states, manifest.rows, manifest.pooling),
        ("hook points", f"{len(manifest.points):,}"),
        ("size", human_bytes(sum(file.bytes for file in manifest.files()))),
        ("files", "already there; nothing was left to do" if there else f"{done.linked} linked, {done.copied} copied"),
    ]
    terminal.table(facts, "merged")


def exported(done: "Exported", to: str, terminal: Terminal) -> None:
    """What an export made."""
    facts = [
        ("folder", str(done.path)),
        ("rows", f"{done.states:,}"),
        ("values", done.dtype),
        ("size", f"{human_bytes(done.bytes)} in {done.files} files"),
    ]
    terminal.table(facts, f"exported to {to}")


def command_line(arguments: Sequence[str]) -> str:
    """As it would be typed."""
    module = Path(arguments[0]).parts[-2:] == ("nemo_qwen_hidden", "__main__.py")
    return shlex.join(["python", "-m", "nemo_qwen_hidden", *arguments[1:]] if module else arguments)


def _verified_facts(report: "Report") -> Facts:
    what = "every byte" if report.full else "names, sizes and headers (--full reads every byte)"
    bad = len({finding.file for finding in report.findings})
    facts = [
        ("store", str(report.path)),
        ("checked", f"{report.files} files, {human_bytes(report.bytes)}: {what}"),
        ("wrong", f"{bad} file{'s' * (bad != 1)}" if bad else "nothing"),
    ]
    return facts if report.unfinished is None else [*facts, ("unfinished", report.unfinished)]


def _rows(rows: range | None) -> str:
    return "-" if rows is None else f"{rows.start:,} to {rows.stop - 1:,}"


def _rows_of(done: "Repair", point: Any, shard: int) -> range | None:
    found = (f.rows for f in done.found.findings if (f.hook_point, f.shard) == (point, shard))
    return next(found, None)


def _size_facts(described: Mapping[str, Any], files: int) -> Facts:
    dtypes, parts = described["dtypes"], described["parts"]
    sizes = sorted({part["shard_rows"] for part in parts})
    of = f", of up to {' or '.join(f'{size:,}' for size in sizes[:3])} rows" if sizes else ""
    return [
        ("path", described["path"]),
        ("rows", f"{described['rows']:,} tokens of {described['documents']:,} documents"),
        *_kept_facts(described["states"], described["rows"], described["pooling"]),
        ("hidden size", f"{described['hidden_size']:,}"),
        ("hook points", f"{len(described['hook_points']):,}"),
        ("dtype", f"{dtypes['stored']} stored, {dtypes['compute']} computed"),
        ("shards", f"{described['shards']:,} a hook point{of}"),
        ("size", human_bytes(described["bytes"])),
        ("checksums", f"SHA-256 of {files:,} files, which `verify --full` compares"),
        ("final norm", "its weight is stored" if described["final_norm"] else "its weight is not stored"),
    ]


def _kept_facts(states: int, rows: int, pooling: str | None) -> Facts:
    """Of a store that keeps the states of some rows alone."""
    pooled = "" if pooling is None else f", pooled ({pooling})"
    return [] if states == rows and pooling is None else [("states", f"{states:,} of {rows:,} rows{pooled}")]


def _origin_facts(described: Mapping[str, Any]) -> Facts:
    """Provenance, as far as the manifest has it: it belongs to whoever made the store."""
    model, data = described["model"], described["parts"][0]["data"] if described["parts"] else {}
    producer = described["producers"][-1] if described["producers"] else {}
    config, layout, command = model.get("config") or {}, producer.get("layout"), producer.get("command")
    one, started = len(described["parts"]) == 1, producer.get("started_unix_secs")
    facts = {
        "model": model.get("path"),
        "weights sha256": _short(model.get("weights_sha256")),
        "adapter": _adapter(model.get("adapter")),
        "architecture": _architecture(config) if config else None,
        "data": data.get("path") if one else None,
        "data sha256": _short(data.get("sha256")) if one else None,
        "tokenizer": _short(described["tokenizer"].get("sha256")),
        "selection": _selection(described) if described["parts"] else None,
        "windows": data.get("max_tokens") and f"of at most {data['max_tokens']:,} tokens",
        "layout": layout and _layout(layout),
        "versions": ", ".join(f"{name} {number}" for name, number in (producer.get("versions") or {}).items()),
        "begun": started and _time(started),
        "command": command and command_line([str(argument) for argument in command]),
    }
    return [(label, str(value)) for label, value in facts.items() if value]


def _selection(described: Mapping[str, Any]) -> str | None:
    rule = described["parts"][0]["selection"]
    return rule and ", ".join(f"{name}={value}" for name, value in rule.items())


def _part_rows(described: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            str(number),
            f"{part['rows']:,}",
            f"{part['documents']:,}",
            f"{part['shard_rows']:,} rows",
            str(part["data"].get("path") or "-"),
        )
        for number, part in enumerate(described["parts"])
    ]


def _step_rows(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each phase."""
    lines: list[tuple[str, ...]] = []
    for phase in dict.fromkeys(step["phase"] for step in steps):
        mine = [step for step in steps if step["phase"] == phase]
        numbers = [step["step"] for step in mine]
        rows, samples = (sum(step[name] for step in mine) for name in ("rows", "documents"))
        lines.append((phase, f"{len(mine):,}", f"{min(numbers):,} to {max(numbers):,}", f"{rows:,}", f"{samples:,}"))
    return lines


def _job_rows(described: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for job in described["producers"]:
        started, layout = job.get("started_unix_secs"), job.get("layout")
        rows.append((str(job.get("work", "-")), _time(started) if started else "-", _layout(layout) if layout else "-"))
    return rows


def _hook_point_row(point: Mapping[str, Any]) -> tuple[str, ...]:
    index = point["huggingface_index"]
    return (
        point["name"],
        " x ".join(map(str, point["shape"])),
        "-" if index is None else f"[{index}]",
        f"{point['norm']} the final norm",
        human_bytes(point["bytes"]),
    )


def _value_row(point: Mapping[str, Any], known: Any) -> tuple[str, ...]:
    exact = point["error_rms"] is None
    return (
        point["name"],
        f"{known.rms:.3g}",
        f"{point['max_abs']:.4g}",
        "-" if known.median_norm is None else f"{known.median_norm:.4g}",
        f"{point['max_norm']:.4g}",
        f"{point['nan']:,}, {point['inf']:,}",
        *(("none", "none") if exact else (_percent(point["error_rms"]), _percent(point["error_max"]))),
    )


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %"


def _adapter(adapter: Mapping[str, Any] | None) -> str | None:
    if adapter is None:
        return None
    if "sha256" not in adapter:  # of a run that trains it
        return f"{adapter.get('kind')} in training, dim {adapter.get('dim')}, alpha {adapter.get('alpha')}"
    return f"{adapter.get('path')}, sha256 {_short(adapter.get('sha256'))}"


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


def _layout(layout: Mapping[str, Any]) -> str:
    """Of the axes that a store need not have, only those that are more than 1."""
    shown = {axis: size for axis, size in layout.items() if axis not in ("vp", "cp") or size != 1}
    return " ".join(f"{axis}={str(size).lower()}" for axis, size in shown.items())


def _time(unix_secs: float) -> str:
    return datetime.fromtimestamp(unix_secs).astimezone().isoformat(" ", "seconds")


def _short(digest: object) -> str | None:
    return f"{str(digest)[:12]}..." if digest else None


def _shown(points: Sequence[Any]) -> list[Any]:
    """Those of a long table that ``_ends`` shows."""
    half = SHOWN_ROWS // 2
    return [*points] if len(points) <= SHOWN_ROWS else [*points[:half], *points[-half:]]


def _ends(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """All rows, or both ends of a long table."""
    if len(rows) <= SHOWN_ROWS:
        return [*rows]
    half = SHOWN_ROWS // 2
    gap = (f"... {len(rows) - 2 * half} more", *[""] * (len(rows[0]) - 1))
    return [*rows[:half], gap, *rows[-half:]]
