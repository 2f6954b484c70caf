"""Hypotheses about what the model is fed: token ids, positions, which tokens see which, padding. T: tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nemo_qwen_hidden.doctor.hypothesis import Hypothesis
from nemo_qwen_hidden.doctor.reference import NO_ROW, Feed, Refeed, Reference, causal, zigzag_places

RANKS = (2, 4, 8)


def hypotheses(reference: Reference) -> Iterator[Hypothesis]:
    """Those that make sense for this model."""
    yield from _visibility()
    yield from _positions()
    yield from _padding(reference)
    yield from _tokens(reference)


def _fed(fault: str, says: str, refeed: Refeed, *, whole: bool = False) -> Hypothesis:
    return Hypothesis(fault=fault, says=says, feeds=(refeed,), whole=whole)


def _each(change: Callable[[Feed], Feed]) -> Refeed:
    return lambda feeds: [change(feed) for feed in feeds]


# Which tokens see which


def _visibility() -> Iterator[Hypothesis]:
    def everything(feed: Feed) -> Feed:
        tokens = len(feed.token_ids)
        return replace(feed, visible=torch.ones(tokens, tokens, dtype=torch.bool))

    yield _fed("not-causal", "every token sees those after it too: attention is not causal", _each(everything))

    def strictly(feed: Feed) -> Feed:
        tokens = len(feed.token_ids)
        visible = causal(tokens).tril(-1)
        visible[0, 0] = True
        return replace(feed, visible=visible)

    yield _fed("sees-not-itself", "no token sees itself: the causal mask is one off", _each(strictly))

    def beyond(feed: Feed) -> Feed:
        tokens = len(feed.token_ids)
        return replace(feed, visible=torch.ones(tokens, tokens, dtype=torch.bool).tril(1))

    yield _fed("sees-next", "every token sees the next one: the causal mask is one off", _each(beyond))
    for window in (8, 16, 32, 64, 128):
        says = f"attention sees {window} tokens back alone (a sliding window)"
        yield _fed("window", says, _each(partial(_windowed, window=window)))
    for ranks in RANKS:
        says = f"attention stays within each of {ranks} context parallel ranks"
        yield _fed("ranks-apart", says, _each(partial(_apart, ranks=ranks)))
    packed = "documents packed into one sequence see those before them"
    for order, said in ((_as_given, ""), (_longest_first, " (longest first)")):
        yield _fed(
            "documents-leak", f"{packed}{said}; positions begin anew in each", _packed(order, anew=True), whole=True
        )
        says = f"{packed}{said}, and positions go on from one to the next"
        yield _fed("documents-leak", says, _packed(order, anew=False), whole=True)


def _windowed(feed: Feed, window: int) -> Feed:
    visible = causal(len(feed.token_ids))
    return replace(feed, visible=visible & ~visible.tril(-window))


def _apart(feed: Feed, ranks: int) -> Feed:
    """Under the zig-zag, rank r has chunks r and 2 * ranks - 1 - r."""
    tokens = len(feed.token_ids)
    chunk = torch.arange(tokens) // max(1, -(-tokens // (2 * ranks)))
    owner = torch.minimum(chunk, 2 * ranks - 1 - chunk)
    return replace(feed, visible=causal(tokens) & (owner[:, None] == owner[None, :]))


def _as_given(feeds: Sequence[Feed]) -> list[Feed]:
    return list(feeds)


def _longest_first(feeds: Sequence[Feed]) -> list[Feed]:
    return sorted(feeds, key=lambda feed: -len(feed.token_ids))


def _packed(order: Callable[[Sequence[Feed]], list[Feed]], *, anew: bool) -> Refeed:
    def refeed(feeds: Sequence[Feed]) -> Sequence[Feed]:
        laid = order(feeds)
        ids = torch.cat([feed.token_ids for feed in laid])
        positions = torch.cat([feed.positions for feed in laid]) if anew else torch.arange(len(ids))
        rows = torch.cat([feed.rows for feed in laid])
        return [Feed(token_ids=ids, positions=positions, rows=rows, visible=causal(len(ids)))]

    return refeed


# Positions


def _positions() -> Iterator[Hypothesis]:
    def moved(fault: str, says: str, move: Callable[[Tensor], Tensor]) -> Hypothesis:
        return _fed(fault, says, _each(lambda feed: replace(feed, positions=move(feed.positions))))

    for shift in (1, -1, 2, -2, 8, 16, 32, 64, 128):
        # attention knows distances alone: this is seen in rotated queries and keys only
        says = f"positions are shifted by {shift:+}"
        yield moved("positions-shifted", says, partial(_moved_by, shift=shift))
    yield moved("positions-reversed", "positions run backwards", lambda positions: positions.flip(0))
    for ranks in RANKS:
        says = f"positions begin anew in each of {ranks} equal parts, as on the ranks of a split sequence"
        yield moved("positions-of-ranks", says, partial(_anew, parts=ranks))
        says = f"positions of {ranks} context parallel ranks are given without regard to their zig-zag"
        yield moved("positions-of-ranks", says, partial(_zigzagged, ranks=ranks))
    for ranks in RANKS:
        says = f"{ranks} context parallel ranks get consecutive tokens, and attention takes them for a zig-zag's"
        yield _fed("not-zigzagged", says, _each(partial(_not_zigzagged, ranks=ranks)))
    yield _fed("positions-run-on", "positions go on from one document to the next", _run_on, whole=True)


def _moved_by(positions: Tensor, shift: int) -> Tensor:
    return positions + shift


def _anew(positions: Tensor, parts: int) -> Tensor:
    tokens = len(positions)
    return torch.arange(tokens) % max(1, -(-tokens // parts))


def _zigzagged(positions: Tensor, ranks: int) -> Tensor:
    """The position that a token of the zig-zag would have, were each rank's tokens consecutive."""
    tokens = len(positions)
    return zigzag_places(tokens, ranks).argsort()[:tokens]


def _not_zigzagged(feed: Feed, ranks: int) -> Feed:
    """What is the token at place i of the ranks' tokens is taken for that at place i of the zig-zag; padding (token 0)
    comes between them."""
    tokens, places = len(feed.token_ids), zigzag_places(len(feed.token_ids), ranks)
    ids, rows = torch.zeros_like(places), torch.full_like(places, NO_ROW)
    ids[places[:tokens]], rows[places[:tokens]] = feed.token_ids, feed.rows
    return Feed(token_ids=ids, positions=torch.arange(len(places)), rows=rows)


def _run_on(feeds: Sequence[Feed]) -> Sequence[Feed]:
    moved, start = [], 0
    for feed in feeds:
        moved.append(replace(feed, positions=feed.positions + start))
        start += len(feed.token_ids)
    return moved


# Padding


def _padding(reference: Reference) -> Iterator[Hypothesis]:
    for pad in pad_tokens(reference):
        says = f"documents are padded on the left with token {pad}, which the others see"
        yield _fed("padding-seen", says, _left_padded(pad, seen=True, misread=False), whole=True)
        for seen, said in ((True, "seen by the others"), (False, "masked")):
            says = f"documents are padded on the left (token {pad}, {said}), and their states read from the left"
            yield _fed("padding-side", says, _left_padded(pad, seen=seen, misread=True), whole=True)


def pad_tokens(reference: Reference) -> tuple[int, ...]:
    """Tokens that batches of this model are likely padded with."""
    likely = (reference.config.pad_token_id, reference.config.eos_token_id, 0)
    return tuple(dict.fromkeys(int(token) for token in likely if isinstance(token, int)))


def _left_padded(pad: int, *, seen: bool, misread: bool) -> Refeed:
    """As long as the longest. misread: the states of a document are taken from the beginning of its sequence, so that
    those of padding are among them; where padding is masked, nothing is known of these."""

    def refeed(feeds: Sequence[Feed]) -> Sequence[Feed]:
        longest = max(len(feed.token_ids) for feed in feeds)
        return [_pad(feed, longest - len(feed.token_ids)) for feed in feeds]

    def _pad(feed: Feed, count: int) -> Feed:
        tokens = count + len(feed.token_ids)
        ids = torch.cat([torch.full((count,), pad), feed.token_ids])
        rows = torch.full((tokens,), NO_ROW)
        if misread:
            rows[: len(feed.rows)] = feed.rows
            if not seen:
                rows[:count] = NO_ROW
        else:
            rows[count:] = feed.rows
        visible = causal(tokens)
        if not seen:
            visible[count:, :count] = False
        return Feed(token_ids=ids, positions=torch.arange(tokens), rows=rows, visible=visible)

    return refeed


# Vocabulary


def _tokens(reference: Reference) -> Iterator[Hypothesis]:
    size = int(reference.config.vocab_size)

    def renamed(says: str, rename: Callable[[Tensor], Tensor]) -> Hypothesis:
        return _fed("vocabulary", says, _each(lambda feed: replace(feed, token_ids=rename(feed.token_ids))))

    for shift in (1, -1):
        says = f"token ids are shifted by {shift:+}"
        yield renamed(says, partial(_renumbered, shift=shift, size=size))
    for shift, said in ((-1, "that before it"), (1, "that after it")):
        says = f"each token got the id of {said} in its document"
        yield _fed("tokens-shifted", says, _each(partial(_neighbours, shift=shift)))


def _renumbered(ids: Tensor, shift: int, size: int) -> Tensor:
    return (ids + shift) % size


def _neighbours(feed: Feed, shift: int) -> Feed:
    """The state of the token at an end, whose neighbour is not known, is not either, nor is any that sees it."""
    ids = feed.token_ids.roll(-shift)
    rows = feed.rows.clone()
    if shift > 0:
        rows[-1:] = NO_ROW
        return replace(feed, token_ids=ids, rows=rows)
    return replace(feed, token_ids=ids[1:], positions=feed.positions[1:], rows=rows[1:])
