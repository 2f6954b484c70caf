"""Slices on their way from a GPU, with a GPU's stream played by the test: it decides when a copy has ended."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from nemo_qwen_hidden.capture.staging import CudaCopies, Staging, staged
from nemo_qwen_hidden.capture.taps import LocalSlice
from nemo_qwen_hidden.hookpoint import HookPoint

POINT = HookPoint("resid_post", 1)
SLICE_BYTES = 4 * 6


@dataclass
class FakeCopy:
    """Copies when it ends, not when it begins, as a GPU may."""

    pairs: list[tuple[Tensor, Tensor]]
    waited: bool = False
    done: bool = False

    def end(self) -> None:
        for place, source in self.pairs:
            place.copy_(source)
        self.done = True

    def ended(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.waited = not self.done
        self.end()


@dataclass
class FakeStream:
    copies: list[FakeCopy] = field(default_factory=list)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], FakeCopy]:
        places = tuple(torch.full_like(each, -1.0) for each in tensors)
        self.copies.append(FakeCopy(list(zip(places, tensors, strict=True))))
        return places, self.copies[-1]


def slices(count: int, *, divisor: bool = False) -> Iterable[LocalSlice]:
    for number in range(count):
        values, divisors = torch.full((2, 3), float(number)), torch.full((2,), number + 0.5)
        yield LocalSlice(
            hook_point=POINT, microbatch=number, runs=(), values=values, divisor=divisors if divisor else None
        )


def numbers(pieces: list[LocalSlice]) -> list[int]:
    """Of slices whose values have arrived."""
    for piece in pieces:
        assert piece.values.eq(piece.microbatch).all()
    return [piece.microbatch for piece in pieces]


def test_nothing_is_waited_for_and_the_rest_comes_at_the_end() -> None:
    stream, got = FakeStream(), list[LocalSlice]()
    staging = Staging(got.append, stream)
    for piece in slices(5):
        staging(piece)
    assert got == [] and not any(copy.waited for copy in stream.copies)
    staging.finish()
    assert numbers(got) == [0, 1, 2, 3, 4]


def test_what_has_ended_is_handed_on_in_order() -> None:
    stream, got = FakeStream(), list[LocalSlice]()
    staging = Staging(got.append, stream)
    pieces = iter(slices(6))
    for _ in range(3):
        staging(next(pieces))
    stream.copies[1].end()  # before the one in front of it
    staging(next(pieces))
    assert got == []
    stream.copies[0].end()
    staging(next(pieces))
    assert numbers(got) == [0, 1] and not any(copy.waited for copy in stream.copies)
    staging.finish()
    assert numbers(got) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fitting", [1, 2, 3])
def test_no_more_bytes_than_allowed_are_on_their_way(fitting: int) -> None:
    stream, got = FakeStream(), list[LocalSlice]()
    staging = Staging(got.append, stream, most_bytes=fitting * SLICE_BYTES)
    for number, piece in enumerate(slices(7), start=1):
        staging(piece)
        assert len(stream.copies) == number
        assert numbers(got) == list(range(max(0, number - fitting)))
        assert [copy.waited for copy in stream.copies] == [True] * len(got) + [False] * (number - len(got))
    staging.finish()
    assert numbers(got) == list(range(7))


def test_a_slice_that_is_larger_goes_alone() -> None:
    stream, got = FakeStream(), list[LocalSlice]()
    staging = Staging(got.append, stream, most_bytes=SLICE_BYTES - 1)
    for number, piece in enumerate(slices(3)):
        staging(piece)
        assert numbers(got) == list(range(number))
    staging.finish()
    assert numbers(got) == [0, 1, 2]


def test_what_is_copied_lives_until_it_has_been() -> None:
    """A tensor that goes gives its memory to the next one, which a copy would then read."""
    stream, got = FakeStream(), list[LocalSlice]()
    staging = Staging(got.append, stream)
    (piece,) = slices(1)
    alive = weakref.ref(piece)
    staging(piece)
    del piece
    assert alive() is not None
    staging.finish()
    assert alive() is None


def test_divisors_come_along() -> None:
    stream, got = FakeStream(), list[LocalSlice]()
    staging = Staging(got.append, stream)
    for piece in slices(2, divisor=True):
        staging(piece)
    staging.finish()
    for piece in got:
        assert piece.divisor is not None and piece.divisor.eq(piece.microbatch + 0.5).all()


def test_on_a_cpu_slices_pass_through() -> None:
    got = list[LocalSlice]()
    (piece,) = slices(1)
    with staged(got.append, torch.device("cpu")) as sink:
        sink(piece)
        assert got == [piece]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_waits_for_what_computes_it_and_keeps_it() -> None:
    """Long products in front of each slice, and memory that is freed and taken again at once behind it."""
    device, got = torch.device("cuda", torch.cuda.current_device()), list[LocalSlice]()
    factor = torch.eye(2048, device=device)
    staging = Staging(got.append, CudaCopies(device), most_bytes=64 * 2**20)
    for number in range(40):
        values = torch.full((2048, 2048), float(number), device=device)
        for _ in range(10):
            values = values @ factor
        staging(LocalSlice(hook_point=POINT, microbatch=number, runs=(), values=values))
        del values
        torch.full((2048, 2048), -1.0, device=device)
    staging.finish()
    assert numbers(got) == list(range(40))
    assert all(piece.values.device.type == "cpu" and piece.values.is_pinned() for piece in got)
