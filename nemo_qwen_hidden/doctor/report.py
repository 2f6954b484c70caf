"""The doctor's result, as values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "failed", "skipped"]
OK: Status = "ok"
FAILED: Status = "failed"
SKIPPED: Status = "skipped"


@dataclass(frozen=True, kw_only=True)
class Place:
    """The first place, in the order of the model, that differs: hook point, document and token, both from 0."""

    hook_point: str
    document: int
    token: int

    def __str__(self) -> str:
        return f"{self.hook_point}, document {self.document}, token {self.token}"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. detail: numbers, or why it was skipped. place: where it fails first."""

    name: str
    status: Status
    detail: str
    place: Place | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong. fault: a name from docs/doctor.md, ``unexplained`` where no hypothesis holds. says: a sentence.
    evidence: numbers, a line each."""

    fault: str
    says: str
    evidence: tuple[str, ...] = ()


UNEXPLAINED = "unexplained"


@dataclass(frozen=True, kw_only=True)
class Report:
    """subject: what was looked at, as labels and values. notes: what is healthy but worth a word."""

    subject: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.status != FAILED for check in self.checks)

    @property
    def faults(self) -> tuple[str, ...]:
        """Names of what is wrong."""
        return tuple(finding.fault for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "healthy": self.healthy,
            "subject": dict(self.subject),
            "checks": [asdict(check) for check in self.checks],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }


def number(value: float) -> str:
    """Two significant digits: ``3.1e-07``."""
    return f"{value:.1e}"


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def some(texts: Sequence[str], most: int = 4) -> str:
    """All of them, or the ends of a long list."""
    return ", ".join(texts if len(texts) <= most else [*texts[: most - 1], "...", texts[-1]])
