"""Which steps of a training run are captured, and which samples of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from nemo_qwen_hidden.errors import ConfigError, UserError, raise_all

TRAIN, VALIDATION = "train", "validation"
PHASES = (TRAIN, VALIDATION)

Samples = Sequence[int] | Callable[[int], bool]
"""Numbers of samples, or whether the sample of a number is wanted."""


@dataclass(frozen=True)
class Schedule:
    """A step is captured if ``every`` divides it or ``steps`` names it, and it is from ``first`` to ``last``.

    Steps are counted as Lightning's ``global_step`` does, from 0, over the whole run: resuming shifts nothing, and the
    weights of step 0 are those that the run began with. A validation bears the number of the step that comes next.

    every: None: none but ``steps``; where these are not given either, every step. phases: of ``PHASES``. samples:
    Megatron's numbers (see ``docs/watching.md``), or a function that says whether one is wanted; None: all.

    Raises:
        ConfigError, ConfigErrors: what cannot be, every problem at once.
    """

    every: int | None = None
    steps: Sequence[int] = ()
    first: int = 0
    last: int | None = None
    phases: Sequence[str] = (TRAIN,)
    samples: Samples | None = None

    def __post_init__(self) -> None:
        raise_all(self._problems())

    def captures(self, phase: str, step: int) -> bool:
        """Whether anything of this step is captured."""
        if phase not in self.phases or step < self.first or (self.last is not None and step > self.last):
            return False
        every = 1 if self.every is None and not self.steps else self.every
        return step in self.steps or (every is not None and step % every == 0)

    def chooses(self, sample: int) -> bool:
        """Whether the sample of this number is captured."""
        if self.samples is None:
            return True
        return bool(self.samples(sample)) if callable(self.samples) else sample in self._numbers

    @cached_property
    def _numbers(self) -> frozenset[int]:
        assert self.samples is not None and not callable(self.samples)
        return frozenset(self.samples)

    def _problems(self) -> list[UserError]:
        problems: list[UserError] = []
        if self.every is not None and not (_whole(self.every) and self.every > 0):
            problems.append(ConfigError("every", "must be a whole number of steps, at least 1, or None", self.every))
        if not _counts(self.steps):
            problems.append(ConfigError("steps", "must be a list of whole numbers from 0", self.steps))
        if not _counts([self.first]):
            problems.append(ConfigError("first", "must be a whole number from 0", self.first))
        elif self.last is not None and not (_whole(self.last) and self.last >= self.first):
            rule = f"must be a whole number, not below `first` ({self.first}), or None"
            problems.append(ConfigError("last", rule, self.last))
        if isinstance(self.phases, str) or not self.phases or not set(self.phases) <= set(PHASES):
            problems.append(ConfigError("phases", f"must be some of {', '.join(PHASES)}", self.phases))
        if not (self.samples is None or callable(self.samples) or (_counts(self.samples) and len(self.samples))):
            rule = "must be a list of whole numbers from 0, at least one, or a function of one, or None for all"
            problems.append(ConfigError("samples", rule, self.samples))
        return problems


def _counts(numbers: object) -> bool:
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        return False
    return all(_whole(number) and number >= 0 for number in numbers)


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
