"""What tests of ranks share: hearing of them, and whether they live."""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

LIVES_SECS = 15.0


class Listener:
    """Keeps what ranks send; ranks send their process id first."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.events: list[tuple[int, Any]] = []
        self._then = then

    def __call__(self, rank: int, event: Any) -> None:
        self.events.append((rank, event))
        self._then()

    def none_is_alive(self) -> bool:
        return all_end(pid for _, pid in self.events)


def all_end(pids: Iterable[int], within_secs: float = LIVES_SECS) -> bool:
    """Waits for processes, of whosever children, to end; whether all have."""
    alive, deadline = set(pids), time.monotonic() + within_secs
    while alive and time.monotonic() < deadline:
        time.sleep(0.02)
        alive = {pid for pid in alive if exists(pid)}
    return not alive


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
