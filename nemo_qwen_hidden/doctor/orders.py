"""Hypotheses about rows: the right states, in the wrong places. R: rows."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nemo_qwen_hidden.doctor.hypothesis import Hypothesis
from nemo_qwen_hidden.doctor.observation import Observation, States
from nemo_qwen_hidden.doctor.reference import NO_ROW, zigzag_places
from nemo_qwen_hidden.hookpoint import HookPoint

RANKS = (2, 4, 8)
Order = Callable[[int], Tensor]
"""Tokens of a sequence to, for each place, the token whose state is there."""


def hypotheses(observation: Observation, points: Sequence[HookPoint]) -> Iterator[Hypothesis]:
    """Rearrangements of the rows at ``points``."""
    seen: set[tuple[int, ...]] = {tuple(range(observation.rows))}
    for fault, says, order in _orders(observation):
        key = tuple(order.tolist())
        if key not in seen:
            seen.add(key)
            yield rearranged(fault, says, order, points)


def rearranged(fault: str, says: str, order: Tensor, points: Sequence[HookPoint]) -> Hypothesis:
    """order: int64 [R], for each row the row whose state is there; ``NO_ROW`` where that is not known."""
    moved = frozenset(points)

    def turn(states: States) -> States:
        return {point: _moved(values, order) if point in moved else values for point, values in states.items()}

    return Hypothesis(fault=fault, says=says, turn=turn, whole=True)


def _moved(values: Tensor, order: Tensor) -> Tensor:
    return torch.where((order == NO_ROW)[:, None], torch.nan, values[order.clamp_min(0)])


def _orders(observation: Observation) -> Iterator[tuple[str, str, Tensor]]:
    lengths, starts = [len(passage) for passage in observation.passages], observation.starts
    rows = observation.rows
    for says, order in _within():
        yield from _scopes(says, order, lengths, starts, rows)
    yield from _between(lengths, starts)


def _within() -> Iterator[tuple[str, Order]]:
    for ranks in RANKS:
        zigzagged = f"the zig-zag of {ranks} context parallel ranks was"
        yield f"{zigzagged} not undone", partial(zigzag, ranks=ranks)
        yield f"{zigzagged} not undone, and padding taken for tokens", partial(_padded_zigzag, ranks=ranks)
        yield f"{zigzagged} undone where there was none", partial(_undone, partial(zigzag, ranks=ranks))
    for ranks in RANKS:
        says = f"stripes of {ranks} ranks (sequence parallel) are put together in the wrong order"
        for shift in sorted({1, ranks - 1}):
            yield says, partial(_stripes, ranks=ranks, shift=shift)
        says = f"tokens were dealt out to {ranks} ranks one by one, and taken for consecutive ones"
        yield says, partial(_dealt_tokens, ranks=ranks)
        says = f"tokens of {ranks} ranks were put together one by one, where each had consecutive ones"
        yield says, partial(_undone, partial(_dealt_tokens, ranks=ranks))
    yield "tokens stand in reverse order", _reversed
    yield "each row holds the state of the next token", partial(_shifted, shift=1)
    yield "each row holds the state of the previous token", partial(_shifted, shift=-1)


def _scopes(
    says: str, order: Order, lengths: Sequence[int], starts: Sequence[int], rows: int
) -> Iterator[tuple[str, str, Tensor]]:
    """In each document, in all rows together, and in all rows with the longest documents first."""
    fault = "tokens-shifted" if says.startswith("each row") else "tokens-permuted"
    each = [_offset(order(length), start) for length, start in zip(lengths, starts, strict=False)]
    yield fault, f"{says}, in each document", torch.cat(each)
    yield fault, f"{says}, over all documents laid end to end", order(rows)
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    laid = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in longest_first])
    moved = order(rows)
    found = torch.full((rows,), NO_ROW)
    found[laid] = torch.where(moved == NO_ROW, NO_ROW, laid[moved.clamp_min(0)])
    yield fault, f"{says}, over all documents laid end to end, longest first", found


def _offset(order: Tensor, start: int) -> Tensor:
    return torch.where(order == NO_ROW, NO_ROW, order + start)


def _between(lengths: Sequence[int], starts: Sequence[int]) -> Iterator[tuple[str, str, Tensor]]:
    """Whole documents in other places."""
    pieces = [torch.arange(start, start + length) for length, start in zip(lengths, starts, strict=False)]
    count = len(lengths)
    orders = [
        ("reversed", list(reversed(range(count)))),
        ("sorted by length, longest first", sorted(range(count), key=lambda index: -lengths[index])),
        ("sorted by length, shortest first", sorted(range(count), key=lambda index: lengths[index])),
    ]
    orders += [
        (f"dealt out to {ranks} replicas and joined replica by replica", _dealt(count, ranks)) for ranks in RANKS
    ]
    orders += [(f"rotated by {shift}", [(index + shift) % count for index in range(count)]) for shift in (1, -1)]
    for says, order in orders:
        yield "documents-permuted", f"documents are {says}", torch.cat([pieces[index] for index in order])
    by_position = sorted((token, index) for index, length in enumerate(lengths) for token in range(length))
    transposed = torch.tensor([starts[index] + token for token, index in by_position], dtype=torch.int64)
    yield "axes-swapped", "token by token of all documents, not document by document: axes were swapped", transposed
    if len(set(lengths)) == 1:
        yield (
            "axes-swapped",
            "document by document, where token by token was meant: axes were swapped",
            transposed.argsort(),
        )


def _dealt(count: int, ranks: int) -> list[int]:
    return [index for rank in range(ranks) for index in range(rank, count, ranks)]


def zigzag(tokens: int, ranks: int) -> Tensor:
    """The tokens as ``ranks`` context parallel ranks have them, rank after rank, without the padding."""
    places = zigzag_places(tokens, ranks)
    return places[places < tokens]


def _padded_zigzag(tokens: int, ranks: int) -> Tensor:
    places = zigzag_places(tokens, ranks)[:tokens]
    return torch.where(places < tokens, places, NO_ROW)


def _undone(order: Order, tokens: int) -> Tensor:
    return order(tokens).argsort()


def _reversed(tokens: int) -> Tensor:
    return torch.arange(tokens).flip(0)


def _dealt_tokens(tokens: int, ranks: int) -> Tensor:
    return torch.cat([torch.arange(tokens)[rank::ranks] for rank in range(ranks)])


def _stripes(tokens: int, ranks: int, shift: int) -> Tensor:
    size = max(1, -(-tokens // ranks))
    stripes = list(torch.arange(tokens).split(size))
    shift %= max(1, len(stripes))
    return torch.cat(stripes[shift:] + stripes[:shift])


def _shifted(tokens: int, shift: int) -> Tensor:
    order = torch.arange(tokens) + shift
    return torch.where((order < 0) | (order >= tokens), NO_ROW, order)


def nearest(found: Tensor, expected: Tensor, tolerance: float) -> Tensor | None:
    """int64 [R], for each row of ``found`` the row of ``expected`` that it is; None where some row is none of them."""
    distances = torch.cdist(found.double(), expected.double())
    off, order = distances.min(dim=1)
    norms = expected.double().norm(dim=1)[order]
    # cdist subtracts squares of norms, which costs half of the digits
    right = off <= norms * max(tolerance, 1e-4)
    return order if bool(right.all()) else None


def describe(order: Tensor, observation: Observation) -> str:
    """A rearrangement in words, by its first row that has moved."""
    row = int((order != torch.arange(len(order))).nonzero()[0])
    document, token = observation.place(row)
    there, of = observation.place(int(order[row]))
    return (
        f"rows are rearranged in a way that no layout is known for: document {document}, token {token} holds the state "
        f"of document {there}, token {of}"
    )
