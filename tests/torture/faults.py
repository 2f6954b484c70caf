"""File calls of one process, written down before and after they are made, of which one may be the process's last.

The log is the harness's memory of what was durable when: it lives beside the store, one JSON list a line, appended by
all processes. A call is logged in lower case before it is made and in upper case, with the same number, after it; with
``FAILED`` where it did nothing.
"""

import base64
import builtins
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAILED = "!"
LETHAL = ("pwrite", "fsync", "rename", "replace", "ftruncate", "unlink", "mkdir", "open", "rmdir")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is patched in a process, and when it dies.

    role: ``coordinator`` or ``rank0``, ...; store: its files are watched; folder: of the log and of what calls have
    replaced. dies: the role, the function and which call of it is the last. moment: ``before`` that call, ``half`` way
    through the bytes of a pwrite, or ``after`` it.
    """

    role: str
    store: Path
    folder: Path
    dies: tuple[str, str, int] | None = None
    moment: str = "before"

    @property
    def log(self) -> Path:
        return self.folder / "calls.jsonl"

    @property
    def kept(self) -> Path:
        """Hard links to files that have lost their name."""
        return self.folder / "kept"

    @property
    def pids(self) -> Path:
        return self.folder / "pids"


def install(watch: Watch) -> None:
    """Patches this process, for good."""
    (watch.pids / str(os.getpid())).write_text(watch.role)
    _Patches(watch).install()


class _Patches:
    def __init__(self, watch: Watch) -> None:
        self._watch, self._lock, self._numbers = watch, threading.Lock(), itertools.count()
        self._log = os.open(watch.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._calls: dict[str, int] = {}
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in LETHAL}
        self._open = builtins.open
        self._store = str(watch.store)

    def install(self) -> None:
        for name in LETHAL:
            setattr(os, name, getattr(self, name))
        os.remove = self.unlink
        builtins.open = self.builtin_open  # type: ignore[assignment]

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        path = self._path(descriptor)
        if path is None:
            return self._real["pwrite"](descriptor, data, offset)
        view, identity = memoryview(data).cast("B"), os.fstat(descriptor)
        try:
            old = os.pread(descriptor, len(view), offset)
        except OSError:  # opened for writing alone
            with self._open(f"/proc/self/fd/{descriptor}", "rb") as file:
                old = os.pread(file.fileno(), len(view), offset)
        event = ("w", identity.st_ino, offset, len(view), base64.b64encode(old).decode())

        def half() -> None:
            self._real["pwrite"](descriptor, view[: max(1, len(view) // 2)], offset)

        return self._call("pwrite", event, lambda: self._real["pwrite"](descriptor, view, offset), half)

    def ftruncate(self, descriptor: int, length: int) -> None:
        path = self._path(descriptor)
        if path is None:
            return self._real["ftruncate"](descriptor, length)
        identity = os.fstat(descriptor)
        event = ("t", identity.st_ino, length, identity.st_size)
        return self._call("ftruncate", event, lambda: self._real["ftruncate"](descriptor, length))

    def fsync(self, descriptor: int) -> None:
        path = self._path(descriptor) or self._above(descriptor)
        if path is None:
            return self._real["fsync"](descriptor)
        event = ("f", os.fstat(descriptor).st_ino, path)
        return self._call("fsync", event, lambda: self._real["fsync"](descriptor))

    def rename(self, source: Any, target: Any, **options: Any) -> None:
        return self._rename("rename", source, target, options)

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        return self._rename("replace", source, target, options)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        name = self._name(path, dir_fd)
        if name is None or not os.path.lexists(name):
            return self._real["unlink"](path, dir_fd=dir_fd)
        event = ("u", name, os.lstat(name).st_ino, self._keep(name))
        return self._call("unlink", event, lambda: self._real["unlink"](path, dir_fd=dir_fd))

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        name = self._name(path, dir_fd)
        if name is None or os.path.lexists(name):
            return self._real["mkdir"](path, mode, dir_fd=dir_fd)
        return self._call("mkdir", ("m", name), lambda: self._real["mkdir"](path, mode, dir_fd=dir_fd))

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        name = self._name(path, dir_fd)
        if name is None:
            return self._real["rmdir"](path, dir_fd=dir_fd)
        return self._call("rmdir", ("d", name), lambda: self._real["rmdir"](path, dir_fd=dir_fd))

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = self._name(path, dir_fd) if flags & os.O_CREAT else None
        if name is None or os.path.lexists(name):
            return self._real["open"](path, flags, mode, dir_fd=dir_fd)
        return self._call("open", ("c", name), lambda: self._real["open"](path, flags, mode, dir_fd=dir_fd))

    def builtin_open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        name = self._name(file, None) if not isinstance(file, int) and set(mode) & set("wxa") else None
        if name is None:
            return self._open(file, mode, *arguments, **options)
        event = ("c", name) if not os.path.lexists(name) else ("o", name)
        opened = self._call("open", event, lambda: self._open(file, mode, *arguments, **options))
        self._say(["o", name, os.fstat(opened.fileno()).st_ino])
        return opened

    def _rename(self, kind: str, source: Any, target: Any, options: dict[str, Any]) -> None:
        old, new = self._name(source, None), self._name(target, None)
        if old is None or new is None or not os.path.lexists(old):
            return self._real[kind](source, target, **options)
        kept = self._keep(new) if os.path.lexists(new) else None
        event = ("r", old, new, os.lstat(old).st_ino, kept)
        return self._call(kind, event, lambda: self._real[kind](source, target, **options))

    def _call(
        self, kind: str, event: tuple[Any, ...], call: Callable[[], Any], half: Callable[[], None] = lambda: None
    ) -> Any:
        with self._lock:
            self._calls[kind] = self._calls.get(kind, 0) + 1
            last = self._watch.dies == (self._watch.role, kind, self._calls[kind])
        number = f"{os.getpid()}.{next(self._numbers)}"
        self._say([event[0], number, self._watch.role, kind, *event[1:]])
        if last and self._watch.moment != "after":
            if self._watch.moment == "half":
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            result = call()
        except OSError:
            self._say([FAILED, number])
            raise
        self._say([event[0].upper(), number])
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _say(self, event: list[Any]) -> None:
        os.write(self._log, json.dumps(event, separators=(",", ":")).encode() + b"\n")

    def _keep(self, name: str) -> str:
        kept = str(self._watch.kept / f"{os.getpid()}-{next(self._numbers)}")
        if not os.path.islink(name):
            os.link(name, kept)
        return kept

    def _path(self, descriptor: int) -> str | None:
        """The path of a file or folder of the store, None where it is none of the store's."""
        try:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return None
        return self._ours(name.removesuffix(" (deleted)"))

    def _above(self, descriptor: int) -> str | None:
        """The folder of the store's folder, in which that one's name is."""
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        return name if name == os.path.dirname(self._store) else None

    def _name(self, path: Any, dir_fd: int | None) -> str | None:
        name = os.fspath(path)
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        if dir_fd is not None:
            name = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), name)
        return self._ours(os.path.abspath(name))

    def _ours(self, name: str) -> str | None:
        return name if name == self._store or name.startswith(self._store + os.sep) else None
