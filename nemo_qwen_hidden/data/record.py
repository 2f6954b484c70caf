"""One record of a JSON or column file, as a document."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_qwen_hidden.data.chat_record import messages_of
from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.files import SourceFile
from nemo_qwen_hidden.data.mask_record import mask_of, spans_of
from nemo_qwen_hidden.errors import DataError

TOKEN_IDS = "token_ids"


@dataclass(frozen=True)
class Fields:
    """Names of the fields that hold a record's text, its messages, its id and, where one is used, its mask.

    Raises:
        DataError: two of them, or one and ``token_ids``, are the same.
    """

    text: str
    id: str
    messages: str = "messages"
    mask: str | None = None

    def __post_init__(self) -> None:
        taken = [TOKEN_IDS]
        for setting, name in (
            ("data.text_field", self.text),
            ("data.messages_field", self.messages),
            ("data.id_field", self.id),
            ("tokens.mask_field", self.mask),
        ):
            if name in taken:
                others = ", ".join(f"`{other}`" for other in taken)
                raise DataError(setting, f"must name a field other than {others}", name)
            if name is not None:
                taken.append(name)

    @property
    def contents(self) -> tuple[str, str, str]:
        """The fields of which a record has one."""
        return self.text, TOKEN_IDS, self.messages


def to_document(record: Mapping[str, object], *, file: SourceFile, index: int, place: str, fields: Fields) -> Document:
    """The document that a record holds; a field that is null counts as absent.

    Args:
        index: 0-based number of the record in its file; ``<source>#<index>`` names a document without an id of its own.
        place: where the record stands, for messages, e.g. ``line 3 of 'x.jsonl'``.

    Raises:
        DataError: none or several of text, token ids and messages, or a field of the wrong type.
    """
    text, token_ids, messages = (record.get(name) for name in fields.contents)
    _check_one(record, file=file, place=place, fields=fields)
    if text is not None and not isinstance(text, str):
        raise file.error(f"must hold a string in `{fields.text}` ({place} has {type(text).__name__})")
    ids = None if token_ids is None else _integers(token_ids, file, place)
    turns = None if messages is None else messages_of(messages, file=file, place=place, field=fields.messages)
    mask, spans = None, None
    if fields.mask is not None:
        given = record.get(fields.mask)
        if text is not None:
            spans = spans_of(given, len(text), file=file, place=place, field=fields.mask)
        else:
            mask = mask_of(given, None if ids is None else len(ids), file=file, place=place, field=fields.mask)
    return Document(
        id=document_id(record, file, index, place, fields),
        source=file.name,
        text=text,
        token_ids=ids,
        messages=turns,
        mask=mask,
        spans=spans,
    )


def _check_one(record: Mapping[str, object], *, file: SourceFile, place: str, fields: Fields) -> None:
    """Whether a record has one content, and no other."""
    found = [name for name in fields.contents if record.get(name) is not None]
    if len(found) == 1:
        return
    if found:
        held = " and ".join(f"`{name}`" for name in found)
        what = f"{place} has {held}; `data.text_field` and `data.messages_field` may name other fields"
    else:
        held = ", ".join(f"`{name}`" for name in record) or "nothing"
        what = f"{place} has {held}; `data.text_field` names the text"
    text, token_ids, messages = fields.contents
    raise file.error(f"must hold one of `{text}`, `{token_ids}` and `{messages}` in each record ({what})")


def document_id(record: Mapping[str, object], file: SourceFile, index: int, place: str, fields: Fields) -> str:
    """The id of the document in a record: its own, or ``<source>#<index>``; see ``to_document``."""
    given = record.get(fields.id)
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
