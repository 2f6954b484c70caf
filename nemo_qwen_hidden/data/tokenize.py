"""Documents as checked token ids, in the order in which they came."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_qwen_hidden.data import chat
from nemo_qwen_hidden.data.document import DATA_PATH, Document
from nemo_qwen_hidden.data.tokenizer import Tokenizer
from nemo_qwen_hidden.errors import DataError

_Encoded = tuple[list[int], npt.NDArray[np.bool_] | None]


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """token_ids: int32 [tokens], each from 0 to the model's vocabulary size - 1; it may be empty. mask: bool [tokens],
    those that the record, or the assistant's turns, mark; None where neither was asked for."""

    id: str
    source: str
    token_ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_] | None = None


def tokenize(
    documents: Iterable[Document],
    tokenizer: Callable[[], Tokenizer],
    *,
    vocab_size: int,
    batch_characters: int = 1 << 20,
    assistant: bool = False,
) -> Iterator[TokenizedDocument]:
    """Every document with its token ids, none dropped and none added.

    Args:
        tokenizer: gives the tokenizer; called once, at the first text or chat, and never for documents that have token
            ids.
        vocab_size: rows of the model's embedding.
        batch_characters: texts are tokenized together up to this many characters, unless a single one is longer.
        assistant: mark what the assistant says; every document has to be a chat then.

    Raises:
        DataError: an id outside the vocabulary, or one that is no integer; names document and position. A chat that the
            model's template does not take, or no chat where ``assistant`` asks for one.
        CheckpointError: a chat, and a model without a chat template.
    """
    loaded: Tokenizer | None = None
    ids: Sequence[int]
    for batch in _batches(documents, batch_characters):
        if assistant:
            _check_chats(batch)
        if loaded is None and any(document.token_ids is None for document in batch):
            loaded = tokenizer()
        encoded = iter(_encoded(batch, loaded, assistant=assistant) if loaded is not None else ())
        for document in batch:
            if document.token_ids is not None:
                given = document.mask
                ids, mask = document.token_ids, None if given is None else np.asarray(given, np.bool_)
            else:
                ids, mask = next(encoded)
            yield TokenizedDocument(document.id, document.source, _checked(ids, document, vocab_size), mask)


def require_tokens(rows: int, path: str) -> None:
    """Raises ``DataError`` when a whole data set has come to no tokens at all."""
    if rows == 0:
        raise DataError(DATA_PATH, "must hold at least one token (each of its documents, if any, is empty)", path)


def _check_chats(documents: Iterable[Document]) -> None:
    for document in documents:
        if document.messages is None:
            held = f"document {document.id!r} holds {'text' if document.token_ids is None else 'token ids'}"
            rule = f"must hold chats alone where `tokens.keep` is assistant ({held})"
            raise DataError(DATA_PATH, rule, document.source)


def _encoded(documents: list[Document], tokenizer: Tokenizer, *, assistant: bool) -> Iterator[_Encoded]:
    """Ids and mask of each text and chat, in order."""
    texts = [_text_of(document, tokenizer, assistant=assistant) for document in documents if document.token_ids is None]
    # A chat template writes the special tokens of a chat.
    chats = _encoded_alike([text for text in texts if text.is_chat], tokenizer, add_special_tokens=False)
    plain = _encoded_alike([text for text in texts if not text.is_chat], tokenizer)
    for text in texts:
        yield next(chats if text.is_chat else plain)


@dataclass(frozen=True, slots=True)
class _Text:
    text: str
    spans: Sequence[tuple[int, int]] | None
    is_chat: bool


def _text_of(document: Document, tokenizer: Tokenizer, *, assistant: bool) -> _Text:
    if document.text is not None:
        return _Text(document.text, document.spans, False)
    return _Text(*chat.render(document, tokenizer, assistant=assistant), True)


def _encoded_alike(texts: list[_Text], tokenizer: Tokenizer, **options: bool) -> Iterator[_Encoded]:
    contents = [text.text for text in texts]
    if all(text.spans is None for text in texts):
        yield from ((ids, None) for ids in tokenizer.encode_batch(contents, **options))
        return
    for text, (ids, offsets) in zip(texts, tokenizer.encode_spans(contents, **options), strict=True):
        yield ids, None if text.spans is None else overlapping(offsets, text.spans)


def overlapping(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """bool [tokens]: which tokens, standing for these characters of a text, have one in any of ``spans``."""
    tokens, chosen = (np.asarray(pairs, np.int64).reshape(-1, 2) for pairs in (offsets, spans))
    steps = np.zeros(1 + max(tokens.max(initial=0), chosen.max(initial=0)), np.int64)
    np.add.at(steps, chosen[:, 0], 1)
    np.add.at(steps, chosen[:, 1], -1)
    inside = np.cumsum(steps) > 0
    before = np.concatenate([[0], np.cumsum(inside)])  # characters inside of a span, before each
    marked: npt.NDArray[np.bool_] = before[tokens[:, 1]] > before[tokens[:, 0]]
    return marked


def _batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for document in documents:
        size = 1 + _size(document)  # 1, so that many empty documents fill a batch too
        if batch and held + size > characters:
            yield batch
            batch, held = [], 0
        batch.append(document)
        held += size
    if batch:
        yield batch


def _size(document: Document) -> int:
    if document.messages is not None:
        return sum(len(message.get("content") or "") for message in document.messages)
    content = document.token_ids if document.text is None else document.text
    return 0 if content is None else len(content)


def _checked(ids: Sequence[int], document: Document, vocab_size: int) -> npt.NDArray[np.int32]:
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.ndim == 1 and array.dtype.kind in "iu":
        outside = np.flatnonzero((array < 0) | (array >= vocab_size))
        if outside.size == 0:
            return array.astype(np.int32)
        position = int(outside[0])
    else:
        # Not all are integers, or some are too long for numpy and therefore out of range.
        position = next(n for n, token in enumerate(ids) if not _is_integer(token) or not 0 <= token < vocab_size)
    token, where = ids[position], f"document {document.id!r}, position {position}"
    if not _is_integer(token):
        raise DataError(DATA_PATH, f"must hold integer token ids ({where})", token)
    raise DataError(DATA_PATH, f"must hold token ids from 0 to {vocab_size - 1} ({where})", int(token))


def _is_integer(token: object) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)
