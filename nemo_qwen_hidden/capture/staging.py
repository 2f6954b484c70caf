"""Slices on their way from a GPU to the CPU's memory, while the GPU goes on computing.

A copy goes to pinned memory on a stream of its own, which waits for what computes the slice and which computing does
not wait for. A slice is handed on once its copy has ended, in the order in which slices came. So no hook waits for the
GPU; only when ``most_bytes`` are on their way is the oldest copy waited for.

Where slices are in the CPU's memory already, they are handed on at once.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:  # which needs Megatron
    from nemo_qwen_hidden.capture.taps import LocalSlice, Sink

STAGED_BYTES = 256 * 2**20


class Copy(Protocol):
    """A copy that has begun."""

    def ended(self) -> bool: ...

    def wait(self) -> None: ...


BeginCopy = Callable[[tuple[Tensor, ...]], tuple[tuple[Tensor, ...], Copy]]
"""From tensors of a GPU to where they will be in the CPU's memory, and the copy that has begun."""


@dataclass(frozen=True, kw_only=True)
class _OnTheWay:
    """source: held until the copy has ended, so that its memory is not given to another tensor before."""

    source: "LocalSlice"
    staged: "LocalSlice"
    copy: Copy
    bytes: int


class Staging:
    """A sink that hands slices on in the CPU's memory, in their order, some time later; ``finish`` hands on the rest.

    Args:
        most_bytes: on their way at a time; a slice that is larger goes alone.
    """

    def __init__(self, sink: "Sink", begin_copy: BeginCopy, *, most_bytes: int = STAGED_BYTES) -> None:
        self._sink, self._begin_copy, self._most_bytes = sink, begin_copy, most_bytes
        self._waiting: deque[_OnTheWay] = deque()
        self._bytes = 0

    def __call__(self, piece: "LocalSlice") -> None:
        divisor = () if piece.divisor is None else (piece.divisor,)
        size = piece.values.nbytes + sum(each.nbytes for each in divisor)
        while self._waiting and (self._bytes + size > self._most_bytes or self._waiting[0].copy.ended()):
            self._hand_on()
        (values, *rest), copy = self._begin_copy((piece.values, *divisor))
        staged = replace(piece, values=values, divisor=rest[0] if rest else None)
        self._waiting.append(_OnTheWay(source=piece, staged=staged, copy=copy, bytes=size))
        self._bytes += size

    def finish(self) -> None:
        """Hands on what is still on its way."""
        while self._waiting:
            self._hand_on()

    def _hand_on(self) -> None:
        oldest = self._waiting.popleft()
        self._bytes -= oldest.bytes
        oldest.copy.wait()
        self._sink(oldest.staged)


class CudaCopies:
    """Copies on a stream of their own. The memory comes from torch's cache of pinned memory, which takes a block back
    when its tensor has gone: that is after the copy into it, which ``Staging`` waits for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Copy]:
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)  # from here on: what was asked of the GPU later is not waited for
        staged = tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors)
        with torch.cuda.stream(self._stream):
            for place, each in zip(staged, tensors, strict=True):
                place.copy_(each, non_blocking=True)
        return staged, _CudaCopy(self._stream.record_event())


class _CudaCopy:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def ended(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()


@contextmanager
def staged(sink: "Sink", device: torch.device) -> Iterator["Sink"]:
    """A sink for slices of ``device``, which hands them to ``sink`` in the CPU's memory: the last of them when the
    block ends, none after it has raised."""
    if device.type == "cpu":
        yield sink
        return
    staging = Staging(sink, CudaCopies(device))
    yield staging
    staging.finish()
