"""One document, before its tokens are known."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_qwen_hidden.errors import DataError

DATA_PATH = "data.path"

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """Text, or token ids made elsewhere: exactly one of the two.

    id: its name, the same wherever the data lies. source: the file it comes from, relative to what was asked for.

    Raises:
        DataError: both or neither of text and token_ids, or text that no UTF-8 can hold.
    """

    id: str
    source: str
    text: str | None = None
    token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for what, text in (("document id", self.id), ("file name", self.source), ("text", self.text or "")):
            # isascii costs nothing; only JSON escapes, odd file names and hand-made text can hold surrogates.
            match = None if text.isascii() else _SURROGATE.search(text)
            if match:
                where = f"character {match.start()} of the {what} in document {self.id!r} of {self.source!r}"
                raise DataError(DATA_PATH, f"must hold Unicode text without lone surrogates ({where})", match[0])
        if (self.text is None) == (self.token_ids is None):
            rule = "must give each document exactly one of text and token_ids"
            raise DataError(DATA_PATH, rule, f"{self.id} of {self.source}")
