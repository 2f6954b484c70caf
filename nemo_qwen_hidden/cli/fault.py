"""What went wrong: one line for the terminal, said once by the ranks of a launcher, and all of it in the log."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_qwen_hidden.cli.terminal import Terminal
from nemo_qwen_hidden.errors import USER_ERROR, HiddenStatesError, PeerError, UserError, status_of
from nemo_qwen_hidden.parallel import launch

if TYPE_CHECKING:
    from nemo_qwen_hidden.parallel.peers import Meeting


def fault_line(error: Exception, log: Path) -> str:
    """What ``error`` is, and where more is. Its traceback goes into ``log``, unless its disk is the full one that is
    the reason."""
    with suppress(OSError), open(log, "a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    reason = str(error) if isinstance(error, HiddenStatesError) else f"{type(error).__name__}: {error}"
    return f"{reason.splitlines()[0]} (more in {log})"


@contextmanager
def saying_at_once(terminal: Terminal, log: Path, left: Callable[[], str] | None = None) -> Iterator[None]:
    """Says what is raised inside, and raises PeerError for it. A rank of torchrun's cannot leave that to ``main``: when
    its peers notice and end, torchrun ends it too, perhaps before it gets there.

    left: what is said after it, of what remains then.
    """
    try:
        yield
    except PeerError:
        raise
    except Exception as error:
        terminal.error(str(error) if isinstance(error, UserError) else fault_line(error, log))
        if left is not None:
            terminal.error(left())
        raise PeerError(status_of(error)) from error


@contextmanager
def one_says(meeting: "Meeting | None" = None) -> Iterator[None]:
    """Of an error that several ranks of torchrun's run into, one is left to be said. meeting: of the ranks; None: they
    are torch.distributed's default group."""
    from nemo_qwen_hidden.parallel.peers import first_to_fail, met

    try:
        yield
    except UserError as error:
        if not first_to_fail((meeting or met()).store):
            raise PeerError(USER_ERROR) from error
        raise
    except RuntimeError as error:
        if launch.is_lost_peer(error):
            raise PeerError from error
        raise
