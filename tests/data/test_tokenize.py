"""Documents as checked token ids: order, batches, bounds."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.tokenize import TokenizedDocument, require_tokens, tokenize
from nemo_qwen_hidden.data.tokenizer import Tokenizer, load_tokenizer
from nemo_qwen_hidden.errors import DataError

AutoTokenizer: Any = transformers.AutoTokenizer


class Codepoints:
    """A token for each character. Records the batches that it was given."""

    vocab_size = 0x110000
    fingerprint = "codepoints"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.batches.append(texts)
        return [[ord(character) for character in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def text(name: str, content: str) -> Document:
    return Document(id=name, source="s", text=content)


def tokens(name: str, ids: Any) -> Document:
    return Document(id=name, source="s", token_ids=ids)


def never() -> Tokenizer:
    raise AssertionError("loaded without need")


def rejection(document: Document, vocab_size: int = 384) -> DataError:
    with pytest.raises(DataError) as caught:
        list(tokenize([document], Codepoints, vocab_size=vocab_size))
    assert caught.value.setting == "data.path"
    return caught.value


@pytest.mark.parametrize("batch_characters", [1, 7, 1 << 20])
def test_order_and_mixture_whatever_the_batch(batch_characters: int) -> None:
    documents = [
        text("a", "hello"), tokens("b", [3, 2, 1]), text("c", ""), tokens("d", []), text("e", "wörld" * 9),
        tokens("f", (0, 383)), tokens("g", np.array([5, 6], np.uint16)),
    ]  # fmt: skip
    found = list(tokenize(iter(documents), Codepoints, vocab_size=384, batch_characters=batch_characters))
    assert [(document.id, document.source) for document in found] == [(name, "s") for name in "abcdefg"]
    expected = [[104, 101, 108, 108, 111], [3, 2, 1], [], [], [ord(c) for c in "wörld" * 9], [0, 383], [5, 6]]
    assert [document.token_ids.tolist() for document in found] == expected
    assert {document.token_ids.dtype for document in found} == {np.dtype(np.int32)}
    assert {document.token_ids.ndim for document in found} == {1}


def test_ids_are_those_of_transformers(model_folder: Path) -> None:
    texts = ["the quick brown fox", "", "e\u0301 漢字 👩‍👩‍👧\r\n", "<|endoftext|>x", "z" * 3000]
    documents = [text(str(number), content) for number, content in enumerate(texts)]
    found = list(tokenize(documents, lambda: load_tokenizer(model_folder), vocab_size=384, batch_characters=20))
    theirs = AutoTokenizer.from_pretrained(model_folder)
    assert [document.token_ids.tolist() for document in found] == [theirs(content)["input_ids"] for content in texts]


def test_batches_are_bounded_by_characters() -> None:
    tokenizer = Codepoints()
    documents = [text(str(number), "x" * 30) for number in range(10)] + [text("long", "y" * 500)]
    assert len(list(tokenize(documents, lambda: tokenizer, vocab_size=384, batch_characters=100))) == 11
    assert [len(batch) for batch in tokenizer.batches] == [3, 3, 3, 1, 1]


@pytest.mark.parametrize("content", ["", "x" * 50])
def test_no_more_is_read_than_fills_a_batch(content: str) -> None:
    read = 0

    def documents() -> Iterator[Document]:
        nonlocal read
        for number in range(10_000):
            read += 1
            yield text(str(number), content)

    found = tokenize(documents(), Codepoints, vocab_size=384, batch_characters=200)
    assert read == 0
    next(found)
    assert read <= 201


def test_tokenizer_is_loaded_once_and_only_for_text() -> None:
    assert len(list(tokenize([tokens("a", [1]), tokens("b", [])], never, vocab_size=2))) == 2
    loads = []

    def load() -> Tokenizer:
        loads.append(1)
        return Codepoints()

    list(tokenize([text(str(number), "abc") for number in range(9)], load, vocab_size=384, batch_characters=4))
    assert loads == [1]


@pytest.mark.parametrize("bad", [-1, 384, 2**31, 2**63, 2**64, -(2**63), -(2**70)])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    error = rejection(tokens("x", [1, 2, 3, 4, 5, bad, 1, bad]))
    assert error.rule == "must hold token ids from 0 to 383 (document 'x', position 5)"
    assert error.value == bad
    assert type(error.value) is int


def test_id_of_a_tokenizer_outside_the_vocabulary() -> None:
    error = rejection(text("x", "ab\u0400"))
    assert error.rule == "must hold token ids from 0 to 383 (document 'x', position 2)"
    assert error.value == 0x400
    assert rejection(tokens("x", np.array([0, 400], np.uint16))).value == 400


@pytest.mark.parametrize("bad", [1.0, True, None, "1", [1]])
def test_ids_that_are_no_integers(bad: object) -> None:
    assert rejection(tokens("x", [bad])).rule == "must hold integer token ids (document 'x', position 0)"
    assert rejection(tokens("x", np.array([0.0, 1.0]))).rule == "must hold integer token ids (document 'x', position 0)"


def test_documents_before_a_bad_one_are_given() -> None:
    found = tokenize([tokens("a", [1]), tokens("b", [9])], never, vocab_size=9)
    first = next(found)
    assert isinstance(first, TokenizedDocument)
    with pytest.raises(DataError, match="document 'b'"):
        next(found)


def test_document_holds_exactly_one_of_text_and_ids() -> None:
    for both in ({}, {"text": "a", "token_ids": [1]}, {"text": "", "token_ids": []}):
        with pytest.raises(DataError, match="exactly one of text, token_ids and messages"):
            Document(id="a", source="s", **both)


def test_nothing_at_all() -> None:
    require_tokens(1, "corpus")
    with pytest.raises(DataError, match="must hold at least one token") as caught:
        require_tokens(0, "corpus")
    assert (caught.value.setting, caught.value.value) == ("data.path", "corpus")
    assert list(tokenize([], never, vocab_size=9)) == []
