"""What a linear probe of a probe set is trained to tell. Imports neither NeMo nor torch."""

from collections.abc import Sequence

from nemo_qwen_hidden.drift.labels import of_records

REPEATED = "repeated"
"""Whether a token has stood in its document before, for which nothing needs to be read."""


def check_labels(documents: Sequence[tuple[str, int]], labels: str | None, path: str, *, id_field: str) -> None:
    """Whether the documents, each with its id and its number of tokens, have the labels, before a model has run.

    Args:
        labels: a field of the records at ``path``, ``repeated``, or None.

    Raises:
        DataError: about ``labels``, as ``drift.labels.from_field``.
    """
    if labels is not None and labels != REPEATED:
        of_records(documents, labels, path, id_field=id_field)
