"""Documents as checked token ids, in the order in which they came."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_qwen_hidden.data.document import DATA_PATH, Document
from nemo_qwen_hidden.data.tokenizer import Tokenizer
from nemo_qwen_hidden.errors import DataError


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """token_ids: int32 [tokens], each from 0 to the model's vocabulary size - 1; it may be empty."""

    id: str
    source: str
    token_ids: npt.NDArray[np.int32]


def tokenize(
    documents: Iterable[Document],
    tokenizer: Callable[[], Tokenizer],
    *,
    vocab_size: int,
    batch_characters: int = 1 << 20,
) -> Iterator[TokenizedDocument]:
    """Every document with its token ids, none dropped and none added.

    Args:
        tokenizer: gives the tokenizer; called once, at the first text, and never for documents that have token ids.
        vocab_size: rows of the model's embedding.
        batch_characters: texts are tokenized together up to this many characters, unless a single one is longer.

    Raises:
        DataError: an id outside the vocabulary, or one that is no integer; names document and position.
    """
    loaded: Tokenizer | None = None
    for batch in _batches(documents, batch_characters):
        texts = [document.text for document in batch if document.text is not None]
        if texts and loaded is None:
            loaded = tokenizer()
        encoded = iter(loaded.encode_batch(texts) if loaded is not None and texts else ())
        for document in batch:
            ids = next(encoded) if document.token_ids is None else document.token_ids
            yield TokenizedDocument(document.id, document.source, _checked(ids, document, vocab_size))


def require_tokens(rows: int, path: str) -> None:
    """Raises ``DataError`` when a whole data set has come to no tokens at all."""
    if rows == 0:
        raise DataError(DATA_PATH, "must hold at least one token (each of its documents, if any, is empty)", path)


def _batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for document in documents:
        content = document.token_ids if document.text is None else document.text
        size = 1 + (0 if content is None else len(content))  # 1, so that many empty documents fill a batch too
        if batch and held + size > characters:
            yield batch
            batch, held = [], 0
        batch.append(document)
        held += size
    if batch:
        yield batch


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
