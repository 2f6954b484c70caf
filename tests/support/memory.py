"""Memory of this process, from the kernel."""

import threading
import time
from pathlib import Path
from typing import Self


def anonymous_bytes() -> int:
    """Memory of this process's own, in bytes: pages that it mapped from files are not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class PeakAnonymous:
    """Samples ``anonymous_bytes`` every few milliseconds while entered; ``growth_bytes`` is its peak over the start."""

    def __enter__(self) -> Self:
        self._start = self._peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, anonymous_bytes())
            time.sleep(0.002)

    @property
    def growth_bytes(self) -> int:
        return self._peak - self._start
