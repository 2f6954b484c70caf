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


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """A step of training that is done, counted from 1; ``validation_loss`` where it was followed by one. Losses are
    means over tokens, in nats."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    validation_loss: float | None = None
    tokens_per_second: float


Event = Phase | Progress
Report = Callable[[Event], None]
TrainingReport = Callable[[Phase | TrainingStep], None]


def silent(event: object) -> None:
    """Shows nothing."""
