"""What can go wrong, as types. The command line turns ``UserError`` into one line and exit status 2."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class HiddenStatesError(Exception):
    """Root of every error that this package raises on purpose."""


class UserError(HiddenStatesError, ValueError):
    """Something that was asked for cannot be done as asked; nothing has been written.

    Attributes:
        setting: the configuration key, argument or file that is at fault, e.g. ``parallel.tp``.
        rule: what holds for it, as the rest of a sentence, e.g. ``must divide num_key_value_heads (2)``.
        value: what was given.
    """

    def __init__(self, setting: str, rule: str, value: object) -> None:
        self.setting, self.rule, self.value = setting, rule, value
        super().__init__(f"`{setting}` {rule}, but is {value!r} instead.")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Ranks send their errors to the process that started them."""
        return type(self), (self.setting, self.rule, self.value)


class ConfigError(UserError):
    """A setting breaks a rule."""


class UnsupportedModelError(UserError, NotImplementedError):
    """The model is one whose states could not be reproduced exactly, so it is refused."""


class CheckpointError(UserError):
    """A model folder lacks something, or holds something of the wrong shape."""


class DataError(UserError):
    """The text or tokens given cannot be used."""


class StoreError(UserError):
    """A folder cannot be used as a store, or a store cannot do what was asked."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store where one was expected."""


class ConfigErrors(UserError):
    """Every problem found in one configuration; ``problems`` holds them in order."""

    def __init__(self, problems: Sequence[UserError]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.setting, first.rule, first.value)
        self.args = ("\n".join(str(problem) for problem in self.problems),)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.problems,)


class RankError(HiddenStatesError, RuntimeError):
    """A rank failed or vanished while the others worked."""


class PeerError(HiddenStatesError, RuntimeError):
    """Another rank failed and says why; ``status`` is the exit status to end with."""

    def __init__(self, status: int = 1) -> None:
        self.status = status
        super().__init__("another rank failed, and says why")


FAILED, USER_ERROR = 1, 2


def status_of(error: BaseException) -> int:
    """Exit status of a process that ends with ``error``: 2 for what the user can mend, 1 for the rest."""
    if isinstance(error, PeerError):
        return error.status
    return USER_ERROR if isinstance(error, UserError) else FAILED


class CoverageError(HiddenStatesError, RuntimeError):
    """After a run, some rows were written not at all or more than once: a fault of ours, never the user's."""


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about an argument are about what the user has set: from the one's name to the other's."""
    try:
        yield
    except UserError as error:
        if error.setting not in names:
            raise
        raise type(error)(names[error.setting], error.rule, error.value) from error


def raise_all(problems: Sequence[UserError]) -> None:
    """Raises the one problem, or all of them together; does nothing when there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigErrors(problems)
