"""One line for the terminal of what went wrong, and all of it in the log."""

import traceback
from contextlib import suppress
from pathlib import Path

from nemo_qwen_hidden.errors import HiddenStatesError


def fault_line(error: Exception, log: Path) -> str:
    """What ``error`` is, and where more is. Its traceback goes into ``log``, unless its disk is the full one that is
    the reason."""
    with suppress(OSError), open(log, "a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    reason = str(error) if isinstance(error, HiddenStatesError) else f"{type(error).__name__}: {error}"
    return f"{reason.splitlines()[0]} (more in {log})"
