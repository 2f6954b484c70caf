"""A class for each state of a probe set, which a linear probe is to tell: what the model is asked to know.

Legend: K states of one step, N rows of it, D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemo_qwen_hidden.data.sources import read_fields
from nemo_qwen_hidden.drift.probe_set import ProbeSet
from nemo_qwen_hidden.errors import DataError

UNLABELLED = -1
REPEATED = "the token has stood in its document before"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """name: what is told apart, in words. classes: their names. of_states: int64 [K], the class of each state, by its
    place in ``classes``, or ``UNLABELLED``. documents: int64 [K], the document of each state."""

    name: str
    classes: tuple[str, ...]
    of_states: NDArray[np.int64]
    documents: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.of_states) != len(self.documents):
            rule = f"must be as many as states ({len(self.documents)})"
            raise DataError("labels", rule, len(self.of_states))


def repeated_tokens(probe: ProbeSet, step: int) -> Labels:
    """The labels that need nothing but the probe set: whether each token has stood in its document before. It is not to
    be read off the token alone, so that the states of a model that looks back tell it better than embeddings do."""
    tokens = probe.tokens(step)
    keys = np.stack([np.asarray(tokens.document, np.int64), np.asarray(tokens.token_id, np.int64)])
    _, first = np.unique(keys, axis=1, return_index=True)
    repeated = np.ones(tokens.rows, np.int64)
    repeated[first] = 0
    return _of_rows(probe, step, REPEATED, ("no", "yes"), repeated)


def from_array(probe: ProbeSet, step: int, values: ArrayLike, *, name: str = "labels") -> Labels:
    """Labels given as integers or strings: one for each document [D], or for each token, kept or not, [N].

    Raises:
        DataError: as many as neither; where both are one number they are taken for documents'.
    """
    given, tokens = np.asarray(values), probe.tokens(step)
    if given.ndim != 1 or len(given) not in (tokens.documents, tokens.rows) or given.dtype.kind not in "biuUS":
        rule = f"must be integers or strings, one for each of {tokens.documents} documents or {tokens.rows} tokens"
        raise DataError(name, rule, f"{given.dtype} {list(given.shape)}")
    classes, numbers = np.unique(given, return_inverse=True)
    numbers = numbers.astype(np.int64)
    of_rows = numbers[np.asarray(tokens.document)] if len(given) == tokens.documents else numbers
    return _of_rows(probe, step, name, tuple(map(str, classes)), of_rows)


def from_field(probe: ProbeSet, step: int, field: str, path: str, *, id_field: str = "id") -> Labels:
    """Labels in a field of the probe documents: a string, integer or boolean for all of a document, or a list of them,
    one for each token. Without the field, or where it is null, a document or token has no label and counts for nothing.

    Args:
        path: JSONL files, as ``data.path`` takes them, that hold a record with the id of each document.

    Raises:
        DataError: a document of the probe set is not there, or in several records that differ; or a label is of
            another kind, or not one for each token; no document has one.
    """
    tokens, ids = probe.tokens(step), probe.document_ids(step)
    documents = [(name, len(tokens.document_rows(number))) for number, name in enumerate(ids)]
    of_rows = of_records(documents, field, path, id_field=id_field)
    classes = sorted({label for label in of_rows if label is not None})
    numbers = {label: number for number, label in enumerate(classes)}
    given = np.array([UNLABELLED if label is None else numbers[label] for label in of_rows], np.int64)
    return _of_rows(probe, step, field, tuple(classes), given)


def of_records(
    documents: Sequence[tuple[str, int]], field: str, path: str, *, id_field: str = "id"
) -> list[str | None]:
    """The label of each token of ``documents``, each with its id and its number of tokens; None where there is none.
    Raises as ``from_field``."""
    ids, found = {name for name, _ in documents}, dict[str, object]()
    for name, value in read_fields(path, field, id_field=id_field):
        if found.setdefault(name, value) != value and name in ids:
            raise DataError("labels", f"must be the same in all records with one id ('{path}' has others)", name)
    labels: list[str | None] = []
    for name, tokens in documents:
        if name not in found:
            rule = f"must lie in a record for each document of the probe set ('{path}' lacks one)"
            raise DataError("labels", rule, name)
        labels += _of_document(found[name], tokens, f"`{field}` of {name!r} in '{path}'")
    if all(label is None for label in labels):
        raise DataError("labels", f"must name a field of the records in '{path}'", field)
    return labels


def _of_document(value: object, tokens: int, place: str) -> Sequence[str | None]:
    if not isinstance(value, list):
        return [_label(value, place)] * tokens
    if len(value) != tokens:
        raise DataError("labels", f"must be one for each of {tokens} tokens ({place})", len(value))
    return [_label(each, place) for each in value]


def _label(value: object, place: str) -> str | None:
    if value is None or isinstance(value, str | bool | int):
        return None if value is None else str(value)
    raise DataError("labels", f"must be strings, integers or booleans ({place})", value)


def _of_rows(probe: ProbeSet, step: int, name: str, classes: tuple[str, ...], of_rows: NDArray[np.int64]) -> Labels:
    rows = probe.rows_of_states(step)
    documents = np.asarray(probe.tokens(step).document, np.int64)[rows]
    return Labels(name=name, classes=classes, of_states=of_rows[rows], documents=documents)
