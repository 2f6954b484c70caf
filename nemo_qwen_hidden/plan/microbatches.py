"""How documents become microbatches: windows over long documents, grouping by length, padding or packing.

The microbatches of a corpus depend on its document lengths and on the options here alone: not on the layout (but
for the padding that sequence and context parallelism need), and not on what has been done already.

S: tokens along the sequence axis of one microbatch, padding included. B: sequences side by side in it.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

GROUPED_MICROBATCHES = 64  # documents of about this many microbatches are sorted by length together


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Consecutive rows that attend to each other: a document, or one window of a long one."""

    first_row: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """What goes through the model at once.

    index: number of the microbatch in the corpus. tokens: S. packed: the segments lie end to end in one sequence
    (B = 1), each padded to a multiple of ``segment_multiple``; otherwise one sequence each (B = number of segments),
    padded on the right.
    """

    index: int
    segments: tuple[Segment, ...]
    tokens: int
    packed: bool
    segment_multiple: int = 1

    @property
    def sequences(self) -> int:
        """B."""
        return 1 if self.packed else len(self.segments)

    @property
    def rows(self) -> int:
        """Tokens of the corpus in it, padding not counted."""
        return sum(segment.length for segment in self.segments)

    def bounds(self) -> list[int]:
        """Where each packed segment begins on the sequence axis, and where its padding ends: one more than there are
        segments, or two where the axis is padded at its end."""
        sizes = (_up(segment.length, self.segment_multiple) for segment in self.segments)
        bounds = list(accumulate(sizes, initial=0))
        return bounds if bounds[-1] == self.tokens else [*bounds, self.tokens]

    def segment_numbers(self) -> Callable[[int], int]:
        """From a row of this microbatch to the number of its segment."""
        order = sorted(range(len(self.segments)), key=lambda number: self.segments[number].first_row)
        starts = [self.segments[number].first_row for number in order]
        return lambda row: order[bisect_right(starts, row) - 1]

    def places(self) -> Iterator[tuple[Segment, int, int]]:
        """Each segment, the sequence that it is in (0 to B-1), and its first token there (0 to S-1)."""
        if self.packed:
            for segment, offset in zip(self.segments, self.bounds(), strict=False):
                yield segment, 0, offset
        else:
            for sequence, segment in enumerate(self.segments):
                yield segment, sequence, 0


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Options. batch_tokens: S x B at the most, unless one segment alone is longer. multiple_of: S is made a
    multiple of it, and a packed segment is padded to a multiple of ``segment_multiple``: see ``Topology``."""

    max_tokens: int
    batch_tokens: int
    packing: bool
    multiple_of: int = 1
    segment_multiple: int = 1

    def padded(self, tokens: int) -> int:
        """``tokens`` rounded up to the next permitted S."""
        return _up(tokens, self.multiple_of)

    def packed_size(self, segment: Segment) -> int:
        """Tokens that a segment takes of a packed sequence."""
        return _up(segment.length, self.segment_multiple)


def _up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def segments(lengths: Iterable[int], max_tokens: int, first_row: int = 0) -> Iterator[Segment]:
    """Documents, in order, as segments of at most ``max_tokens`` tokens; documents without tokens give none."""
    for length in lengths:
        for start in range(0, length, max_tokens):
            yield Segment(first_row=first_row + start, length=min(max_tokens, length - start))
        first_row += length


def plan(
    lengths: Iterable[int], batching: Batching, *, first_row: int = 0, first_index: int = 0
) -> Iterator[Microbatch]:
    """Microbatches over documents of these lengths, lazily and in constant memory; rows and indices are counted from
    ``first_row`` and ``first_index``.

    Segments are taken in groups of about ``GROUPED_MICROBATCHES`` microbatches, sorted by length within a group
    (longest first, then by row), and filled in that order.
    """
    index = first_index
    stream = segments(lengths, batching.max_tokens, first_row)
    for group in _groups(stream, batching.batch_tokens * GROUPED_MICROBATCHES):
        group.sort(key=lambda segment: (-segment.length, segment.first_row))
        for members in _fill(group, batching):
            packing = batching.packing
            total = sum(map(batching.packed_size, members)) if packing else members[0].length
            yield Microbatch(
                index=index,
                segments=tuple(members),
                tokens=batching.padded(total),
                packed=packing,
                segment_multiple=batching.segment_multiple,
            )
            index += 1


def _groups(stream: Iterable[Segment], group_tokens: int) -> Iterator[list[Segment]]:
    group: list[Segment] = []
    tokens = 0
    for segment in stream:
        group.append(segment)
        tokens += segment.length
        if tokens >= group_tokens:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _fill(group: Sequence[Segment], batching: Batching) -> Iterator[list[Segment]]:
    members: list[Segment] = []
    tokens = 0  # taken so far, where packed
    for segment in group:
        if batching.packing:
            size = batching.padded(tokens + batching.packed_size(segment))
        else:  # sorted, so the first member is the longest
            size = batching.padded(members[0].length if members else segment.length) * (len(members) + 1)
        if members and size > batching.batch_tokens:
            yield members
            members, tokens = [], 0
        members.append(segment)
        tokens += batching.packed_size(segment)
    if members:
        yield members


def replica_of(microbatch: Microbatch, dp: int) -> int:
    """The data-parallel replica that runs it."""
    return microbatch.index % dp
