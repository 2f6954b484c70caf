"""Which rows a rank holds of a microbatch, by arithmetic.

The sequence axis of S tokens is cut in two steps, context parallelism first, then the tp axis.

1. Context parallelism cuts it into 2 * cp equal chunks, and rank r has chunks r and 2 * cp - 1 - r, one after the other
   (so that causal attention gives every rank the same work). A packed sequence is cut so document by document. What
   a rank has is described by ``spans``: ranges of tokens of the full axis, C tokens in all, in the order in which they
   lie.
2. The C tokens are cut into tp stripes. Under sequence parallelism a stripe is what the rank has (``hidden_CBH``);
   without it every tp rank has all C tokens and answers for its stripe alone.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nemo_qwen_hidden.plan.microbatches import Microbatch, Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Consecutive rows and where they lie: ``length`` tokens of ``sequence``, from ``index`` on along the C tokens that
    a context-parallel rank has. picked: the offsets of those that are kept, ascending; None: all."""

    first_row: int
    length: int
    sequence: int
    index: int
    picked: tuple[int, ...] | None = None

    @property
    def kept(self) -> int:
        """How many rows are kept."""
        return self.length if self.picked is None else len(self.picked)


def spans_of(microbatch: Microbatch, *, part: int, parts: int) -> tuple[range, ...]:
    """The tokens of the sequence axis that context-parallel rank ``part`` of ``parts`` has, in its order."""
    if parts == 1:
        return (range(microbatch.tokens),)
    return tuple(span for block in _blocks(microbatch) for span in zigzag(block, part, parts))


def stripe(tokens: int, *, part: int, parts: int) -> range:
    """Indices of the C tokens that part ``part`` of ``parts`` answers for; equal parts where ``parts`` divides C."""
    return range(tokens * part // parts, tokens * (part + 1) // parts)


def runs_within(microbatch: Microbatch, spans: Sequence[range], owned: range) -> Iterator[Run]:
    """The rows that lie at the indices ``owned`` of ``spans``, padding left out, in the order of the spans."""
    places = list(microbatch.places())
    starts = [offset for _, _, offset in places] if microbatch.packed else []
    index = 0
    for span in spans:
        first = span.start + max(owned.start - index, 0)
        stop = min(span.stop, span.start + owned.stop - index)
        if first < stop:
            reached = places[bisect_right(starts, first) - 1 : bisect_right(starts, stop - 1)] if starts else places
            for segment, sequence, offset in reached:
                yield from _run(segment, sequence, offset, range(first, stop), index - span.start)
        index += len(span)


def _run(segment: Segment, sequence: int, offset: int, tokens: range, shift: int) -> Iterator[Run]:
    start, stop = max(tokens.start, offset), min(tokens.stop, offset + segment.length)
    if start < stop:
        first_row = segment.first_row + start - offset
        yield Run(first_row=first_row, length=stop - start, sequence=sequence, index=start + shift)


def _blocks(microbatch: Microbatch) -> Iterator[range]:
    """What is cut as a whole: the sequence axis, or each document of a packed sequence and the padding at its end."""
    if not microbatch.packed:
        yield range(microbatch.tokens)
        return
    bounds = microbatch.bounds()
    for start, stop in pairwise(bounds):
        yield range(start, stop)


def zigzag(block: range, part: int, parts: int) -> Iterator[range]:
    """The two chunks of ``block`` that context-parallel rank ``part`` of ``parts`` has."""
    size, rest = divmod(len(block), 2 * parts)
    if rest:
        raise ValueError(f"{len(block)} tokens cannot be cut into {2 * parts} chunks")
    for chunk in (part, 2 * parts - 1 - part):
        yield range(block.start + chunk * size, block.start + (chunk + 1) * size)
