"""The selector over a stream of documents, against the same made afterwards over all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.config import TokenSettings
from nemo_qwen_hidden.data.selector import Selector, choice_of, key_of
from nemo_qwen_hidden.data.tokenize import TokenizedDocument
from nemo_qwen_hidden.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = {"<|a|>": 7, "<|b|>": 9}


class Marked:
    """A tokenizer with two special tokens."""

    special_tokens = SPECIAL


def never() -> Tokenizer:
    raise AssertionError("loaded without need")


def corpus(lengths: Sequence[int], seed: int = 0) -> list[TokenizedDocument]:
    random = np.random.default_rng(seed)
    return [
        TokenizedDocument(f"d{number}", "s", random.integers(0, 12, length, np.int32), random.random(length) < 0.5)
        for number, length in enumerate(lengths)
    ]


def run(settings: TokenSettings, documents: Sequence[TokenizedDocument]) -> tuple[list[list[int]], list[bool]]:
    """Kept positions of each document, and for which of them the selector says that all are."""
    selector = Selector(settings, never if settings.special else Marked)
    first = [selector.kept(document) for document in documents]
    lengths = [len(document.token_ids) for document in documents]
    rows = np.concatenate([[0], np.cumsum(lengths)]).astype(int).tolist()
    found = [selector.drawn(row, length, kept) for row, length, kept in zip(rows, lengths, first, strict=False)]
    listed = [list(range(n)) if kept is None else kept.tolist() for n, kept in zip(lengths, found, strict=True)]
    assert selector.samples_all or [None if kept is None else kept.tolist() for kept in found] == [
        None if kept is None else kept.tolist() for kept in first
    ]
    return listed, [kept is None for kept in found]


LENGTHS = st.lists(st.integers(0, 9), max_size=8)


@given(LENGTHS, st.booleans(), st.booleans(), st.integers(1, 3), st.booleans())
def test_filters_are_those_of_the_documents_together(
    lengths: list[int], special: bool, first: bool, every: int, masked: bool
) -> None:
    settings = TokenSettings(
        keep="mask" if masked else "all", mask_field="m" if masked else None, special=special, first=first, every=every
    )
    documents = corpus(lengths)
    found, alls = run(settings, documents)
    for document, kept, everything in zip(documents, found, alls, strict=True):
        assert document.mask is not None
        assert kept == [
            position
            for position, token in enumerate(document.token_ids)
            if (not masked or document.mask[position])
            and (special or token not in SPECIAL.values())
            and (first or position > 0)
            and position % every == 0
        ]
        assert everything == (len(kept) == len(document.token_ids))


@given(LENGTHS, st.integers(1, 12), st.integers(0, 9), st.booleans())
def test_a_draw_of_all_is_of_the_rows_that_the_filters_leave(
    lengths: list[int], size: int, seed: int, last: bool
) -> None:
    documents = corpus(lengths)
    pool = "last" if last else "none"
    settings = TokenSettings(sample=size, sample_of="all", seed=seed, special=False, pool=pool)
    candidates, _ = run(TokenSettings(special=False), documents)
    drawn, _ = run(settings, documents)
    unpooled, _ = run(TokenSettings(sample=size, sample_of="all", seed=seed, special=False), documents)
    assert sum(map(len, unpooled)) == min(size, sum(map(len, candidates)))
    assert all(set(kept) <= set(of) for kept, of in zip(unpooled, candidates, strict=True))
    assert drawn == ([kept[-1:] for kept in unpooled] if last else unpooled)


def test_a_draw_of_each_document_depends_on_its_id_alone() -> None:
    settings = TokenSettings(sample=3, seed=4)
    documents = corpus([9, 30, 2, 30])
    found, alls = run(settings, documents)
    assert [len(kept) for kept in found] == [3, 3, 2, 3]
    assert alls == [False, False, True, False]
    assert run(settings, documents[::-1])[0] == found[::-1]
    assert run(TokenSettings(sample=3, seed=5), documents)[0] != found
    assert found[1] != found[3]
    assert run(settings, [documents[3]])[0] == [found[3]]


def test_keys_of_documents_are_pinned() -> None:
    """From ``printf %s d1 | sha256sum``: its first 8 bytes, little-endian."""
    assert key_of("d1") == 0xC68F2C159F63538B


def test_nothing_chosen_costs_nothing() -> None:
    selector = Selector(TokenSettings(seed=3), never)
    assert [selector.kept(document) for document in corpus([0, 5])] == [None, None]
    assert selector.as_dict() is None and not selector.samples_all


def test_special_tokens_are_those_that_decoding_can_skip(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    assert sorted(tokenizer.special_tokens) == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    ids = np.array(tokenizer.encode_batch(["the<|im_end|> fox<|endoftext|>"])[0], np.int32)
    selector = Selector(TokenSettings(special=False), lambda: tokenizer)
    kept = selector.kept(TokenizedDocument("a", "s", ids))
    assert kept is not None
    assert tokenizer.decode(ids[kept].tolist()) == "the fox"
    assert tokenizer._tokenizer.decode(ids, skip_special_tokens=True) == "the fox"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, None),
        ({"seed": 5}, None),
        ({"keep": "last"}, {"keep": "last"}),
        ({"keep": "spans", "spans": ("0:4", "-2:")}, {"keep": "spans", "spans": ["0:4", "-2:"]}),
        ({"special": False, "first": False}, {"special": False, "first": False}),
        ({"sample": 5}, {"sample": 5, "seed": 0}),
        ({"sample": 5, "sample_of": "all", "seed": 2}, {"sample": 5, "sample_of": "all", "seed": 2}),
        ({"pool": "mean", "seed": 2}, {"pool": "mean"}),
        (
            {"max_norm": 10.0, "max_norm_at": "resid_post@3", "every": 2},
            {"every": 2, "max_norm": 10.0, "max_norm_at": "resid_post@3"},
        ),
    ],
)
def test_what_a_manifest_says(values: dict[str, Any], said: dict[str, Any] | None) -> None:
    settings = TokenSettings(**values)
    assert choice_of(settings) == Selector(settings, Marked).as_dict() == said
