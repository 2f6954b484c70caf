"""``nemo-qwen-hidden drift``: how the states of a probe set changed as a model was trained, in tables and pictures."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_qwen_hidden.cli.store_commands import Add

if TYPE_CHECKING:
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.drift.labels import Labels
    from nemo_qwen_hidden.drift.probe_set import ProbeSet
    from nemo_qwen_hidden.drift.report import Report

JSON = "drift.json"
_FORMATS = ("png", "svg")

_DRIFT = """\
STORE holds captured steps of a probe set: the same documents through the model
as it was at each of them (ProbeSetCallback). At every hook point each step is
compared with one of them: mean cosine of the states, linear CKA, relative
change, norms, and what a linear probe reads out of the states. docs/drift.md
has the formulas, and what to make of them.

With --to, FOLDER gets drift.json, which has all values, and the pictures
similarity, norms and accuracy; they need the extra `pictures`.

The linear probe tells whether a token has stood in its document before, which
needs nothing but two documents. --labels names a field of the documents'
records instead: one value for a document, or a list with one for each token.

examples:
  nemo-qwen-hidden drift out/probes
  nemo-qwen-hidden drift out/probes --to out/drift --labels kind \\
      --documents probes.jsonl
"""


def add_command(add: Add) -> None:
    """Adds the command to the program's."""
    drift = add("drift", "say how states changed while a model was trained", _DRIFT)
    drift.add_argument("store", metavar="STORE", help="the folder of a store with captured steps")
    drift.add_argument("--to", metavar="FOLDER", help=f"write pictures and {JSON} there")
    drift.add_argument("--format", choices=_FORMATS, default="png", help="of the pictures (png)")
    drift.add_argument("--reference", type=int, metavar="STEP", help="compare with this step, not with the first")
    drift.add_argument("--hook-points", metavar="A,B", help="names with commas between; by default all")
    drift.add_argument("--labels", metavar="FIELD", help="what the linear probe tells apart")
    drift.add_argument("--documents", metavar="FILE", help="JSONL of the probe documents, with FIELD")
    drift.add_argument("--max-norm", type=float, metavar="M", help="outliers are norms above M times the median (10)")
    drift.add_argument("--json", action="store_true", help="all values for programs: JSON on stdout")
    drift.add_argument("--quiet", action="store_true", help="no progress, only the result")
    drift.set_defaults(run=_drift)


def _drift(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.drift.change import MAX_NORM
    from nemo_qwen_hidden.drift.pictures import check_matplotlib
    from nemo_qwen_hidden.drift.probe_set import ProbeSet
    from nemo_qwen_hidden.drift.report import drift
    from nemo_qwen_hidden.errors import ConfigError
    from nemo_qwen_hidden.store.fields import to_json
    from nemo_qwen_hidden.store.read.reader import open_store

    max_norm = MAX_NORM if parsed.max_norm is None else parsed.max_norm
    if not max_norm > 0:
        raise ConfigError("--max-norm", "must be above 0", max_norm)
    if (parsed.labels is None) != (parsed.documents is None):
        rule = "must stand with the other: the field, and the file of the probe documents that have it"
        raise ConfigError("--labels, --documents", rule, parsed.labels or parsed.documents)
    if parsed.to is not None:
        check_matplotlib()
    probe = ProbeSet(open_store(parsed.store))
    names = parsed.hook_points and [name.strip() for name in parsed.hook_points.split(",")]
    labels = _labels(probe, parsed)
    folder = None if parsed.to is None else _folder(parsed.to)
    with Terminal(quiet=parsed.quiet) as terminal:
        with terminal.bytes_progress("comparing") as done:
            report = drift(
                probe,
                reference=parsed.reference,
                hook_points=names or None,
                labels=labels,
                max_norm=max_norm,
                done=done,
            )
        if folder is not None:
            written = _write(report, folder, parsed.format)
        if parsed.json:
            print(to_json(report.as_dict()).decode(), end="")
        else:
            _show(report, terminal)
        if folder is not None:
            terminal.note(f"written: {', '.join(map(str, written))}")
    return 0


def _labels(probe: "ProbeSet", parsed: argparse.Namespace) -> "Labels | None":
    from nemo_qwen_hidden.drift.labels import from_field, repeated_tokens
    from nemo_qwen_hidden.drift.probe_accuracy import can_be_told

    step = probe.steps[0]
    if parsed.labels is None:
        labels = repeated_tokens(probe, step)
        return labels if can_be_told(labels) else None
    return from_field(probe, step, parsed.labels, parsed.documents)


def _folder(path: str) -> Path:
    from nemo_qwen_hidden.errors import ConfigError

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--to", f"must be a folder that can be made ({error.strerror})", path) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError("--to", "must be a folder that can be written", path)
    return folder


def _write(report: "Report", folder: Path, form: str) -> list[Path]:
    from nemo_qwen_hidden.drift.pictures import draw
    from nemo_qwen_hidden.store.fields import to_json

    (folder / JSON).write_bytes(to_json(report.as_dict()))
    return [folder / JSON, *draw(report, folder, form=form)]


def _show(report: "Report", terminal: "Terminal") -> None:
    from nemo_qwen_hidden.drift.report import facts, tables

    terminal.table(facts(report), "drift")
    for table in tables(report):
        terminal.line("")
        terminal.grid(table.header, table.rows, table.title)
