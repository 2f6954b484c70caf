"""Each contestant in a process of its own, which loads its model once and then does what it is told, one at a time."""

import shutil
import traceback
from collections.abc import Sequence
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.work import Case, Choices, Errors, Work
from nemo_qwen_hidden.parallel.launch import fair_threads, output_to

FLOOR, OURS, SCRIPT = "floor", "extract", "script"
CLASSES = {
    SCRIPT: "benchmarks.rivals.script:Script",
    "transformers": "benchmarks.rivals.transformers_tuned:Transformers",
    "transformer_lens": "benchmarks.rivals.lens:Lens",
    "nnsight": "benchmarks.rivals.nnsight_trace:Trace",
    OURS: "benchmarks.rivals.ours:Extract",
    FLOOR: "benchmarks.floor:Floor",
}
RIVALS = tuple(name for name in CLASSES if name not in (SCRIPT, OURS, FLOOR))


class ContestantError(Exception):
    """A contestant failed; the text ends with its traceback."""


class Worker:
    """A contestant, seen from outside. Making it begins to load the model, and ``wait`` ends when it is there.
    ``folder`` is where it writes; what its libraries say goes to a log there."""

    def __init__(self, name: str, kind: str, work: Work, folder: Path) -> None:
        self.name = name
        self._folder, self._runs = folder / name.replace(" ", "-"), 0
        self._folder.mkdir()
        self._pipe, there = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=_serve, args=(there, kind, work, self._folder / "log"))
        self._process.start()
        there.close()
        self._loaded = False

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._pipe.close()  # which ends it, unless it computes
        if kind is not None:
            self._process.terminate()
        self._process.join()

    def wait(self) -> None:
        """Until it can be asked for something."""
        if not self._loaded:
            self._answer()
            self._loaded = True

    def choose(self) -> Choices:
        """What it has found to be its best settings."""
        choices: Choices = self._ask("choose", self._new_folder())
        return choices

    def run(self, case: Case, documents: Sequence[int]) -> tuple[float, Path]:
        """Seconds, and where it has written to."""
        folder = self._new_folder()
        return self._ask("run", case, documents, folder), folder

    def check(self, case: Case, documents: Sequence[int], folder: Path, reference: Path) -> Errors:
        """Compares what ``run`` has written to ``folder`` with our store of all documents in fp32."""
        errors: Errors = self._ask("check", case, documents, folder, reference)
        return errors

    def _new_folder(self) -> Path:
        self._runs += 1
        return self._folder / str(self._runs)

    def _ask(self, *command: Any) -> Any:
        self.wait()
        self._pipe.send(command)
        return self._answer()

    def _answer(self) -> Any:
        try:
            done, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ContestantError(f"{self.name} ended with {self._process.exitcode}") from None
        if not done:
            raise ContestantError(f"{self.name}: {value}")
        return value


def _serve(pipe: Connection, kind: str, work: Work, log: Path) -> None:
    """In the contestant's process."""
    with output_to(log):
        try:
            import torch

            torch.set_num_threads(fair_threads(1))
            module, name = CLASSES[kind].split(":")
            contestant = getattr(import_module(module), name)(work)
            pipe.send((True, None))
            while True:
                pipe.send((True, _obey(contestant, *pipe.recv())))
        except EOFError:  # no more commands
            return
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _obey(contestant: Any, command: str, *args: Any) -> Any:
    from benchmarks.check import check

    if command == "choose":
        (folder,) = args
        folder.mkdir()
        choices = contestant.choose(folder)
        shutil.rmtree(folder)
        return choices
    if command == "run":
        return contestant.run(*args)
    return check(contestant, *args)
