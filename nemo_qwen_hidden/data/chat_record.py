"""The messages of a chat, as a record holds them."""

from typing import Any

from nemo_qwen_hidden.data.document import Message
from nemo_qwen_hidden.data.files import SourceFile

ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")


def messages_of(given: object, *, file: SourceFile, place: str, field: str) -> list[Message]:
    """The messages, checked, with all of their keys; those that are null count as absent, as columns need it.

    Raises:
        DataError: not a list of objects, no message, a role that templates pass over in silence, or an empty turn.
    """
    rule = f"must hold a list of messages in `{field}`"
    if not isinstance(given, list):
        raise file.error(f"{rule} ({place} has {type(given).__name__})")
    if not given:
        raise file.error(f"{rule} ({place} has none)")
    return [_message(message, number, file=file, place=place, field=field) for number, message in enumerate(given)]


def _message(given: object, number: int, *, file: SourceFile, place: str, field: str) -> Message:
    where = f"message {number} of {place}"
    if not isinstance(given, dict):
        rule = f"must hold messages with `role` and `content` in `{field}`"
        raise file.error(f"{rule} ({where} is {type(given).__name__})")
    message: Message = _without_nulls(given)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise file.error(f"must hold messages of the roles {', '.join(ROLES)} in `{field}` ({where} has {role!r})")
    if content is not None and not isinstance(content, str):
        rule = f"must hold a string in `content` of each message in `{field}`"
        raise file.error(f"{rule} ({where} has {type(content).__name__})")
    if not content and not (role == ASSISTANT and message.get("tool_calls")):
        raise file.error(f"must hold no empty message in `{field}` ({where}, of the {role}, is empty)")
    return message


def _without_nulls(value: Any) -> Any:
    """Columns hold a null for every key that another record has."""
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value
