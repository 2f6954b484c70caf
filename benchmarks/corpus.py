"""Real documents: source files of the Python standard library, whole, as token ids."""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
"""Folders that a distribution may leave out, or that are not of the standard library."""
SHORTEST = 16

Documents = tuple[tuple[int, ...], ...]


def ragged(model: Path, *, tokens: int, longest: int) -> Documents:
    """Files of 16 to ``longest`` tokens, about ``tokens`` in all. They are spread evenly over the lengths of all such
    files, so that a small corpus has the lengths of a large one, and their order is that of a hash of their names."""
    found = sorted((len(ids), name, ids) for name, ids in _files(model) if SHORTEST <= len(ids) <= longest)
    if not found:
        raise SystemExit(f"the standard library has no file of {SHORTEST} to {longest} tokens here")
    mean = sum(length for length, _, _ in found) / len(found)
    count = min(len(found), max(1, round(tokens / mean)))
    chosen = [found[(2 * number + 1) * len(found) // (2 * count)] for number in range(count)]
    chosen.sort(key=lambda each: hashlib.sha256(each[1].encode()).digest())
    return tuple(ids for _, _, ids in chosen)


def equal(model: Path, *, tokens: int, length: int) -> Documents:
    """Files laid end to end and cut into documents of ``length`` tokens."""
    count = max(1, tokens // length)
    stream = (token for _, ids in sorted(_files(model)) for token in ids)
    return tuple(tuple(next(stream) for _ in range(length)) for _ in range(count))


def _files(model: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each file's path below the standard library, and its token ids."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not LEFT_OUT.intersection(name.parts):
            with tokenize.open(file) as text:
                yield name.as_posix(), tuple(tokenizer.encode(text.read()).ids)
