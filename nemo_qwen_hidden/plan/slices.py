"""Which rows a rank holds of a microbatch, by arithmetic.

The sequence axis of S tokens is cut into tp stripes. Under sequence parallelism a stripe is what the rank has
(its local slice, ``hidden_CBH``); without it every tp rank has all S tokens and answers for its stripe alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_qwen_hidden.plan.microbatches import Microbatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Consecutive rows and where they lie: tokens ``token`` to ``token + length`` of ``sequence``, counted in the
    full sequence axis (0 to S-1)."""

    first_row: int
    length: int
    sequence: int
    token: int


def stripe(tokens: int, *, part: int, parts: int) -> range:
    """Tokens of the sequence axis that part ``part`` of ``parts`` answers for; equal where ``parts`` divides S."""
    return range(tokens * part // parts, tokens * (part + 1) // parts)


def runs_within(microbatch: Microbatch, tokens: range) -> Iterator[Run]:
    """The rows that lie on these tokens of the sequence axis, padding left out, sequence by sequence."""
    for segment, sequence, offset in microbatch.places():
        start = max(tokens.start, offset)
        stop = min(tokens.stop, offset + segment.length)
        if start < stop:
            yield Run(first_row=segment.first_row + start - offset, length=stop - start, sequence=sequence, token=start)
