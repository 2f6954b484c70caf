"""The documents of a fine-tuning run, and how many sequences they come to. Knows neither NeMo nor torch."""

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.sources import read_documents
from nemo_qwen_hidden.data.tokenize import TokenizedDocument, require_tokens, tokenize
from nemo_qwen_hidden.data.tokenizer import Tokenizer, load_tokenizer
from nemo_qwen_hidden.errors import DataError, naming
from nemo_qwen_hidden.plan.training import held_out, sequences_of
from nemo_qwen_hidden.progress import silent
from nemo_qwen_hidden.training.job import DATA, DATA_RECORD, FinetuningJob
from nemo_qwen_hidden.training.watch.probe_labels import check_labels

END_OF_TEXT = "<|endoftext|>"
TOKENIZED_CHARACTERS = 2**24
"""Of text, that is tokenized to count its tokens; of what comes after, characters are counted."""


class Texts:
    """The documents of a run, or those at another path, tokenized as they are asked for.

    Raises:
        DataError: from the iterator, documents that cannot be used.
    """

    def __init__(self, job: FinetuningJob, path: str | None = None) -> None:
        self._job, self._path = job, job.data_path if path is None else path
        self._tokenizer: Tokenizer | None = None

    def __iter__(self) -> Iterator[TokenizedDocument]:
        return self.tokenized(self.read())

    def read(self) -> Iterator[Document]:
        """As they come."""
        return read_documents(self._path, **self._job.fields)

    def tokenized(self, documents: Iterable[Document]) -> Iterator[TokenizedDocument]:
        """With their tokens."""
        return tokenize(documents, self._load, vocab_size=self._job.architecture.shape.vocab_size)

    @property
    def end(self) -> int | None:
        """The token that ends each, known when they were read: the tokenizer's, where one was needed and has it."""
        return None if self._tokenizer is None else self._tokenizer.special_tokens.get(END_OF_TEXT)

    def _load(self) -> Tokenizer:
        self._tokenizer = load_tokenizer(self._job.tokenizer_folder)
        return self._tokenizer


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of a run's data. train, validation: sequences of ``train.seq_length``. documents, tokens: None where the run has
    its sequences already, and the data were not read. held_out: documents for validation. exact: False where only the
    first documents were tokenized, and the tokens of the others follow from their characters."""

    documents: int | None
    held_out: int
    tokens: int | None
    train: int
    validation: int
    exact: bool


def count(job: FinetuningJob, told: Callable[[int], None] = silent) -> Counts:
    """Of the blocks that a run has made already, or else of the documents, which are read to their end. told: how many
    tokens were counted so far.

    Raises:
        DataError: documents that cannot be used.
    """
    there = _blocks(job)
    return _read(job, told) if there is None else there


def _blocks(job: FinetuningJob) -> Counts | None:
    """Of the files that a begun run goes on with."""
    folder = job.run_path / DATA
    if not job.begun or not (folder / DATA_RECORD).is_file():
        return None
    record = json.loads((folder / DATA_RECORD).read_text())
    if record["seq_length"] != job.settings.train.seq_length:
        return None
    counts = {name: len(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("train", "validation")}
    return Counts(documents=None, held_out=record["validation_documents"], tokens=None, exact=True, **counts)


def _read(job: FinetuningJob, told: Callable[[int], None]) -> Counts:
    texts, train = Texts(job), job.settings.train
    documents = texts.read()
    lengths, characters, seen = array("q"), array("q"), 0

    def first() -> Iterator[Document]:
        nonlocal seen
        for document in documents:
            characters.append(_characters(document))
            seen += characters[-1]
            yield document
            if seen >= TOKENIZED_CHARACTERS:
                return

    tokens = 0
    for tokenized in texts.tokenized(first()):
        lengths.append(len(tokenized.token_ids))
        tokens += lengths[-1]
        told(tokens)
    of_a_character = sum(length for length, size in zip(lengths, characters, strict=True) if size) / max(1, seen)
    exact = True
    for document in documents:
        ids, exact = document.token_ids, exact and document.token_ids is not None
        lengths.append(round(of_a_character * _characters(document)) if ids is None else len(ids))
    out = held_out(len(lengths), train.validation_part)
    kept, ends = len(lengths) - out, texts.end is not None
    counts = Counts(
        documents=len(lengths),
        held_out=out,
        tokens=sum(lengths),
        train=sequences_of(sum(lengths[:kept]) + ends * kept, train.seq_length),
        validation=sequences_of(sum(lengths[kept:]) + ends * out, train.seq_length),
        exact=exact,
    )
    check(job, counts)
    return counts


def check(job: FinetuningJob, counts: Counts) -> None:
    """Whether there is enough to train with, and to validate with where that is asked for.

    Raises:
        DataError: there is not.
    """
    assert counts.tokens is not None
    require_tokens(counts.tokens, job.data_path)
    if counts.held_out == counts.documents:
        rule = "must hold a document more than are kept for validation (`train.validation_part`)"
        raise DataError("data.path", rule, f"{counts.documents} in {job.data_path}")
    validated = job.settings.train.global_batch_size if counts.held_out else 0
    purposes = (
        (counts.train, 1, "train with"),
        (counts.validation, validated, "validate with (or none: `train.validation_part` 0)"),
    )
    for there, least, purpose in purposes:
        if there < least:
            rule = f"must hold text for at least {least} sequences of `train.seq_length` to {purpose}"
            raise DataError("data.path", rule, f"text for {there}")


def probe_lengths(job: FinetuningJob) -> list[int]:
    """Tokens of each document of the run's probe set; none where it has none.

    Raises:
        DataError: documents that cannot be used, or not one token; or their labels cannot.
    """
    watch = job.settings.watch
    if watch.probe_store is None:
        return []
    path = str(demo.text_path()) if watch.probe_data is None else os.path.expanduser(watch.probe_data)
    texts = Texts(job, path)
    with naming({"data.path": "watch.probe_data", "labels": "watch.probe_labels"}):
        read = islice(texts.read(), watch.probe_documents)
        documents = [(document.id, len(document.token_ids)) for document in texts.tokenized(read)]
        require_tokens(sum(tokens for _, tokens in documents), path)
        check_labels(documents, watch.probe_labels, path, id_field=job.settings.data.id_field)
    return [tokens for _, tokens in documents]


def _characters(document: Document) -> int:
    """Of a text or a chat; token ids have none."""
    if document.messages is not None:
        return sum(len(message.get("content") or "") for message in document.messages)
    return len(document.text or "")
