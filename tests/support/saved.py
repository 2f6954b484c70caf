"""What autograd keeps for backward passes, and what torch has allocated, counted on a rank."""

import json
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class Saved:
    """Bytes of the storages that autograd keeps, each counted once as long as anything keeps it. But for those that
    ``ignore`` names, such as weights. ``most_bytes``: at once."""

    def __init__(self) -> None:
        self._kept: Counter[tuple[int, int]] = Counter()
        self._ignored: set[int] = set()
        self._bytes = self.most_bytes = 0

    def ignore(self, tensors: Any) -> None:
        """Storages of ``tensors`` are not counted."""
        self._ignored |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """While entered."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            yield

    def _pack(self, tensor: torch.Tensor) -> Any:
        held = _Held(tensor)
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key[0] not in self._ignored:
            self._keep(key, 1)
            weakref.finalize(held, self._keep, key, -1)
        return held

    def _keep(self, key: tuple[int, int], change: int) -> None:
        before = self._kept[key] > 0
        self._kept[key] += change
        self._bytes += key[1] * ((self._kept[key] > 0) - before)
        self.most_bytes = max(self.most_bytes, self._bytes)


@dataclass(eq=False)
class _Held:
    tensor: torch.Tensor


@contextmanager
def allocations(trace: Path) -> Iterator[list[int]]:
    """The list gets, when left, the most bytes that torch had allocated at once since it was entered."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield found
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    found.append(max(event["args"]["Total Allocated"] for event in events))
