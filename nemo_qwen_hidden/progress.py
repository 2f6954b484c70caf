"""What a job says while it runs, as values; whoever owns the terminal shows them."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A new part of the job begins; ``text`` says which, for people."""

    text: str


@dataclass(frozen=True)
class Progress:
    """Rows that one data-parallel replica has finished so far."""

    replica: int
    rows: int


Event = Phase | Progress
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """Shows nothing."""
