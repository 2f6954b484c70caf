"""The text of the demo model: Python's reference topics and standard library, out of the running interpreter.

Both are under the PSF License Version 2. Sources that speak of a copyright or a licence of their own are left out,
and so are tests, bundled packages and character tables.
"""

import hashlib
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

LIBRARY = Path(sysconfig.get_path("stdlib"))
LICENCE = LIBRARY / "LICENSE.txt"
LEFT_OUT = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo",
    "ensurepip", "site-packages", "encodings", "pydoc_data",
}  # fmt: skip
OWN_TERMS = re.compile(r"copyright|licen[cs]e|SPDX-|permission is hereby", re.IGNORECASE)
BLANK_LINES = re.compile(r"(\n(?:[ \t]*\n)+)")
HELD_OUT_SHARE = 0.03
SHARED_PARAGRAPH_CHARS = 100


@dataclass(frozen=True)
class Document:
    """One topic, named ``topics/NAME``, or one source, named by its path in the library. The text is in NFC."""

    name: str
    text: str


def sources() -> Iterator[Document]:
    """The library's sources that this recipe uses, in the order of their paths."""
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        # Files that a build or a distribution adds (build configuration, site customisation) are no stdlib module.
        if parts[0] not in sys.stdlib_module_names or LEFT_OUT & set(parts):
            continue
        text = path.read_text(encoding="utf-8")
        if text.strip() and not OWN_TERMS.search(text):
            yield Document(path.relative_to(LIBRARY).as_posix(), unicodedata.normalize("NFC", text))


def documents() -> list[Document]:
    found = [Document(f"topics/{name}", unicodedata.normalize("NFC", text)) for name, text in sorted(topics.items())]
    return found + list(sources())


def is_held_out(name: str) -> bool:
    """Decides by a hash of the name, so that a document stays on its side when others come or go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def without_paragraphs(text: str, unwanted: set[str]) -> str:
    """``text`` without the paragraphs whose words are in ``unwanted``."""
    pieces = [*BLANK_LINES.split(text), ""]
    pairs = zip(pieces[0::2], pieces[1::2], strict=True)
    return "".join(paragraph + gap for paragraph, gap in pairs if _key(paragraph) not in unwanted)


def split() -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents.

    Topics quote each other and sources share passages: long paragraphs of a held-out document are taken out of
    the training documents, or the held-out loss would partly measure memory.
    """
    everything = documents()
    held_out = [document for document in everything if is_held_out(document.name)]
    paragraphs = {_key(piece) for document in held_out for piece in BLANK_LINES.split(document.text)}
    shared = {paragraph for paragraph in paragraphs if len(paragraph) >= SHARED_PARAGRAPH_CHARS}
    training = [
        Document(document.name, without_paragraphs(document.text, shared))
        for document in everything
        if not is_held_out(document.name)
    ]
    return training, held_out
