"""The one file of all ranks: JSON, an object whose ``traceEvents`` stand one on a line. It is there whole or not at
all."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.trace.record import SETTING

TEMPORARY = ".partial"
Write = Callable[[bytes], None]


def check_place(path: Path) -> None:
    """Whether a file could be made at ``path``. Writes nothing.

    Raises:
        ConfigError: there is a folder, or something that is none on the way.
    """
    if path.is_dir():
        raise ConfigError(SETTING, "must be a file, and no folder", str(path))
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(SETTING, f"must lie in a folder that can be made and written ({above})", str(path))


def clear_place(path: Path) -> None:
    """Makes the folder, and takes an earlier trace away, so that none is taken for that of a run which does not end.

    Raises:
        ConfigError: it cannot be done.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[Write]:
    """Takes events as whole lines of JSON; the file gets its name when the block ends well.

    Raises:
        ConfigError: there is no room, or no such folder any more.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with _naming(path), open(temporary, "wb") as file:
            separator = b'{"displayTimeUnit":"ms","traceEvents":[\n'

            def write(lines: bytes) -> None:
                nonlocal separator
                for line in lines.splitlines():
                    file.write(separator + line)
                    separator = b",\n"

            yield write
            file.write(b"\n]}\n")
        with _naming(path):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def events(path: Path) -> Iterator[dict[str, object]]:
    """The events of a file that ``writing`` has made, one after the other: a long trace does not fit memory.

    Raises:
        ConfigError: it is no such file.
    """
    with _naming(path), open(path, encoding="utf-8") as file:
        if not next(file, "").endswith('"traceEvents":[\n'):
            raise ConfigError("trace", "must be a file that `profile.trace` has made", str(path))
        for line in file:
            if line == "]}\n":
                return
            yield json.loads(line.rstrip(",\n"))
    raise ConfigError("trace", "must be a whole file", str(path))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            SETTING, f"must be a file that can be made and written ({error.strerror})", str(path)
        ) from error
