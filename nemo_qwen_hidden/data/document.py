"""One document, before its tokens are known."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_qwen_hidden.errors import DataError

DATA_PATH = "data.path"

_SURROGATE = re.compile("[\ud800-\udfff]")


Message = Mapping[str, Any]
"""``role`` and ``content``, and what else a chat template may look at."""


@dataclass(frozen=True)
class Document:
    """Text, token ids made elsewhere, or the messages of a chat: exactly one of the three.

    id: its name, the same wherever the data lies. source: the file it comes from, relative to what was asked for.
    mask: whether to keep each of the token ids; spans: (start, stop) of what to keep of the text, in characters
    (Unicode code points). None where nothing was said about it.

    Raises:
        DataError: none or several of text, token_ids and messages, a mask or spans of another of them, or text that no
            UTF-8 can hold.
    """

    id: str
    source: str
    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Message] | None = None
    mask: Sequence[bool] | None = None
    spans: Sequence[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        contents = (str(message.get("content") or "") for message in self.messages or ())
        texts = (("document id", self.id), ("file name", self.source), ("text", self.text or ""))
        for what, text in (*texts, *(("messages", content) for content in contents)):
            # isascii costs nothing; only JSON escapes, odd file names and hand-made text can hold surrogates.
            match = None if text.isascii() else _SURROGATE.search(text)
            if match:
                where = f"character {match.start()} of the {what} in document {self.id!r} of {self.source!r}"
                raise DataError(DATA_PATH, f"must hold Unicode text without lone surrogates ({where})", match[0])
        if sum(content is not None for content in (self.text, self.token_ids, self.messages)) != 1:
            rule = "must give each document exactly one of text, token_ids and messages"
            raise DataError(DATA_PATH, rule, f"{self.id} of {self.source}")
        if self.mask is not None and (self.token_ids is None or len(self.mask) != len(self.token_ids)):
            rule = "must give a mask with token_ids alone, and as many values"
            raise DataError(DATA_PATH, rule, f"{self.id} of {self.source}")
        if self.spans is not None and self.text is None:
            raise DataError(DATA_PATH, "must give spans with text alone", f"{self.id} of {self.source}")
