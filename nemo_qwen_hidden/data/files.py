"""Which files a path stands for, in an order that depends on their names alone."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nemo_qwen_hidden.data.document import DATA_PATH
from nemo_qwen_hidden.errors import DataError

TEXT, JSONL, PARQUET, SAVED = "text", "jsonl", "parquet", "saved"

_SUFFIXES = {".jsonl": JSONL, ".ndjson": JSONL, ".jsonl.gz": JSONL, ".ndjson.gz": JSONL, ".parquet": PARQUET}


@dataclass(frozen=True)
class SourceFile:
    """A file to read, or a folder saved by ``datasets``.

    asked: the path as the user wrote it. path: what to open. name: relative to the folder, to the fixed part of the
    glob, or to the parent of the one file asked for, with forward slashes. kind: one of this module's constants.
    """

    asked: str
    path: Path
    name: str
    kind: str

    def error(self, rule: str) -> DataError:
        """What is wrong with this file, to be raised; ``rule`` should name a place in it."""
        return DataError(DATA_PATH, rule, self.asked)

    def unreadable(self, error: OSError) -> DataError:
        """The operating system's refusal, or damage inside the file, as one line."""
        return _unreadable(self.asked, self.path, error)


def list_files(path: str) -> list[SourceFile]:
    """Every file that ``path`` (a file, folder or glob) stands for, sorted by name; never empty.

    Files and folders whose names start with a dot are skipped. A path that exists is itself, even if it looks like a
    glob. A glob chooses files, not folders.

    Raises:
        DataError: nothing there, no file in it, no permission, or something that is neither file nor folder.
    """
    try:
        found = list(_find(path))
    except OSError as error:
        raise _unreadable(path, Path(error.filename or path), error) from error
    return sorted(found, key=lambda file: file.name)


def _find(asked: str) -> Iterator[SourceFile]:
    path = Path(asked)
    if asked and path.is_dir():
        own_name = Path(os.path.abspath(path)).name
        yield from _or_raise(_in_folder(asked, path, path, own_name), asked, "must hold a file that is not hidden")
    elif asked and (path.is_file() or os.path.lexists(path)):
        yield _source_file(asked, path, path.parent)
    elif glob.has_magic(asked):
        magic = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
        root, patterns = Path(*path.parts[:magic]), path.parts[magic:]
        matched = set(_match(asked, root, patterns))
        chosen = (_source_file(asked, match, root) for match in matched if not match.is_dir())
        only = " (it matches folders, and a glob chooses files)" if matched else ""
        yield from _or_raise(chosen, asked, f"must match at least one file{only}")
    else:
        raise DataError(DATA_PATH, "must be a file, folder or glob that exists", asked)


def _or_raise(files: Iterator[SourceFile], asked: str, rule: str) -> Iterator[SourceFile]:
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise DataError(DATA_PATH, rule, asked)


def _in_folder(asked: str, folder: Path, root: Path, own_name: str) -> Iterator[SourceFile]:
    _refuse_loop(asked, folder)
    if _is_saved(folder):
        name = own_name if folder == root else folder.relative_to(root).as_posix()
        yield SourceFile(asked, folder, name, SAVED)
        return
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in _children(folder) if _is_saved(child))
        held = f"the DatasetDict in '{folder}' holds {', '.join(splits) or 'no split'}"
        raise DataError(DATA_PATH, f"must name the sub-folder of one split ({held})", asked)
    for child in _children(folder):
        if child.is_dir():
            yield from _in_folder(asked, child, root, own_name)
        else:
            yield _source_file(asked, child, root)


def _match(asked: str, folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Own expansion, since ``glob`` and ``Path.glob`` pass over folders that they may not read."""
    if not patterns:
        yield folder
        return
    if not folder.is_dir():
        return
    first, rest = patterns[0], patterns[1:]
    if first == "**":
        _refuse_loop(asked, folder)
        yield from _match(asked, folder, rest or ("*",))
        for child in _children(folder):
            yield from _match(asked, child, patterns)
    elif not glob.has_magic(first):
        if os.path.lexists(folder / first):
            yield from _match(asked, folder / first, rest)
    else:
        for child in _children(folder, hidden=first.startswith(".")):
            if fnmatchcase(child.name, first):
                yield from _match(asked, child, rest)


def _children(folder: Path, *, hidden: bool = False) -> list[Path]:
    return [child for child in folder.iterdir() if hidden or not child.name.startswith(".")]


def _is_saved(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def _source_file(asked: str, path: Path, root: Path) -> SourceFile:
    if not path.is_file():
        # Also keeps a pipe from being opened, which would wait for its writer.
        what = f"'{path}' is neither, or links to nothing"
        raise DataError(DATA_PATH, f"must hold only files and folders ({what})", asked)
    name = path.relative_to(root).as_posix()
    kinds = (kind for suffix, kind in _SUFFIXES.items() if name.lower().endswith(suffix))
    return SourceFile(asked, path, name, next(kinds, TEXT))


def _refuse_loop(asked: str, folder: Path) -> None:
    if folder.is_symlink() and os.path.realpath(folder) in map(os.path.realpath, folder.parents):
        raise DataError(DATA_PATH, f"must not hold a link to a folder above it ('{folder}' is one)", asked)


def _unreadable(asked: str, path: Path, error: OSError) -> DataError:
    reason = error.strerror or " ".join(str(error).split())
    return DataError(DATA_PATH, f"must be readable ('{path}': {reason})", asked)
