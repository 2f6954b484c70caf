"""What a record's mask keeps: of ready-made tokens, each by itself; of text, spans of characters."""

from typing import Any

from nemo_qwen_hidden.data.files import SourceFile


def mask_of(given: object, tokens: int | None, *, file: SourceFile, place: str, field: str) -> list[bool]:
    """Whether each token of a record is kept.

    Args:
        tokens: number of its token ids; None where it has messages.

    Raises:
        DataError: no mask, one of another form or length, or a record of messages.
    """
    if tokens is None:
        rule = f"must hold text or token ids for the mask in `{field}`"
        raise file.error(f"{rule} ({place} has messages, of which `tokens.keep=assistant` makes a mask)")
    rule = f"must hold 0 or 1 for each token in `{field}`"
    flags = _list(given, rule, file, place)
    if len(flags) != tokens:
        raise file.error(f"{rule} ({place} has {len(flags)} for {tokens} tokens)")
    for position, flag in enumerate(flags):
        if not isinstance(flag, int) or flag not in (0, 1):
            raise file.error(f"{rule} ({place} has {flag!r} at position {position})")
    return [bool(flag) for flag in flags]


def spans_of(given: object, characters: int, *, file: SourceFile, place: str, field: str) -> list[tuple[int, int]]:
    """(start, stop) of what is kept of a text, in characters (Unicode code points).

    Raises:
        DataError: no list of pairs, or one that does not lie in the text.
    """
    rule = f"must hold a list of [start, stop] within the text in `{field}`"
    spans = _list(given, rule, file, place)
    for span in spans:
        pair = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        if not pair or not 0 <= span[0] <= span[1] <= characters:
            raise file.error(f"{rule} ({place} has {span!r} and {characters} characters)")
    return [(start, stop) for start, stop in spans]


def _list(given: object, rule: str, file: SourceFile, place: str) -> list[Any]:
    if given is None:
        raise file.error(f"{rule} ({place} has none)")
    if not isinstance(given, list):
        raise file.error(f"{rule} ({place} has {type(given).__name__})")
    return given
