"""One record of a JSON or column file, as a document."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.files import SourceFile
from nemo_qwen_hidden.errors import DataError

TOKEN_IDS = "token_ids"


@dataclass(frozen=True)
class Fields:
    """Names of the fields that hold a record's text and its id.

    Raises:
        DataError: two of them, or one and ``token_ids``, are the same.
    """

    text: str
    id: str

    def __post_init__(self) -> None:
        for setting, name, others in (
            ("data.text_field", self.text, (TOKEN_IDS,)),
            ("data.id_field", self.id, (TOKEN_IDS, self.text)),
        ):
            if name in others:
                raise DataError(setting, "must name a field other than those of the text and of `token_ids`", name)


def to_document(record: Mapping[str, object], *, file: SourceFile, index: int, place: str, fields: Fields) -> Document:
    """The document that a record holds; a field that is null counts as absent.

    Args:
        index: 0-based number of the record in its file; ``<source>#<index>`` names a document without an id of its own.
        place: where the record stands, for messages, e.g. ``line 3 of 'x.jsonl'``.

    Raises:
        DataError: neither or both of text and token ids, or a field of the wrong type.
    """
    text, token_ids = record.get(fields.text), record.get(TOKEN_IDS)
    if (text is None) == (token_ids is None):
        if text is None:
            held = ", ".join(f"`{name}`" for name in record) or "nothing"
            what = f"{place} has {held}; `data.text_field` names the text"
        else:
            what = f"{place} has both; `data.text_field` may name another field"
        raise file.error(f"must hold one of `{fields.text}` and `{TOKEN_IDS}` in each record ({what})")
    if text is not None and not isinstance(text, str):
        raise file.error(f"must hold a string in `{fields.text}` ({place} has {type(text).__name__})")
    return Document(
        id=_document_id(record.get(fields.id), file, index, place, fields),
        source=file.name,
        text=text,
        token_ids=None if token_ids is None else _integers(token_ids, file, place),
    )


def _document_id(given: object, file: SourceFile, index: int, place: str, fields: Fields) -> str:
    if given is None:
        return f"{file.name}#{index}"
    if isinstance(given, str) or type(given) is int:
        return str(given)
    raise file.error(f"must hold a string or an integer in `{fields.id}` ({place} has {type(given).__name__})")


def _integers(token_ids: object, file: SourceFile, place: str) -> list[int]:
    rule = f"must hold a list of integers in `{TOKEN_IDS}`"
    if not isinstance(token_ids, list):
        raise file.error(f"{rule} ({place} has {type(token_ids).__name__})")
    # type, not isinstance: True is an int to isinstance.
    if any(type(token) is not int for token in token_ids):
        position = next(number for number, token in enumerate(token_ids) if type(token) is not int)
        raise file.error(f"{rule} ({place} has {token_ids[position]!r} at position {position})")
    return token_ids
