"""A report as text, for a terminal of 80 columns."""

import textwrap
from collections.abc import Iterator

from nemo_qwen_hidden.doctor.report import Report

COLUMNS = 80
_MARKS = {"ok": "ok     ", "failed": "FAILED ", "skipped": "skipped"}


def lines_of(report: Report) -> Iterator[str]:
    """What was looked at, the checks, and what is wrong."""
    for label, value in report.subject:
        yield from _wrapped(f"{label:<11} ", value)
    yield ""
    for check in report.checks:
        yield f"{_MARKS[check.status]}  {check.name}"
        yield from _wrapped(" " * 9, check.detail)
        if check.place is not None:
            yield from _wrapped(" " * 9, f"first at {check.place}")
    for note in report.notes:
        yield ""
        yield from _wrapped("note: ", note)
    yield ""
    if report.healthy:
        yield "healthy"
    for finding in report.findings:
        yield from _wrapped(f"{finding.fault}: ", finding.says)
        for line in finding.evidence:
            yield from _wrapped("    ", line)


def _wrapped(label: str, text: str) -> Iterator[str]:
    """``text`` behind ``label``, its further lines below its first."""
    indent = " " * min(len(label), 12)
    yield from textwrap.wrap(text, COLUMNS, initial_indent=label, subsequent_indent=indent, break_long_words=False) or [
        label.rstrip()
    ]
