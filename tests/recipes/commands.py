"""The commands that the recipes' READMEs show, and running them as processes that are gone afterwards."""

import io
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_qwen_hidden.parallel.launch import Rank

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
PROGRAM = ["-m", "nemo_qwen_hidden", "extract"]
TIMEOUT_SECS = 240
GRACE_SECS = 10


@dataclass(frozen=True)
class Command:
    """One command of a README, as the words that a shell makes of it."""

    words: tuple[str, ...]

    @property
    def extracts(self) -> bool:
        return any(list(self.words[index : index + 3]) == PROGRAM for index in range(len(self.words)))

    @property
    def launcher(self) -> tuple[str, ...]:
        """What stands before ``-m``: ``python``, or ``torchrun`` and its options."""
        return self.words[: self.words.index("-m")]

    @property
    def world(self) -> int | None:
        """Ranks that the launcher starts; None where there is none."""
        if self.launcher[0] != "torchrun":
            return None
        options = dict(pairwise(self.launcher))
        return int(options.get("--nnodes", "1")) * int(options["--nproc-per-node"])

    @property
    def config(self) -> str:
        return str(ROOT / self.words[self.words.index("--config") + 1])

    @property
    def overrides(self) -> list[str]:
        return list(self.words[self.words.index("--config") + 2 :])

    def to(self, store: Path, *overrides: str) -> list[str]:
        """What follows ``nemo_qwen_hidden``, with another store and further settings."""
        kept = [text for text in self.overrides if not text.startswith("store.path=")]
        return ["extract", "--config", self.config, *kept, f"store.path={store}", *overrides]


def shown_in(readme: Path) -> list[Command]:
    """Every command in the README's indented blocks."""
    lines = [line[4:] for line in readme.read_text().splitlines() if line.startswith("    ")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [Command(tuple(shlex.split(line))) for line in text.splitlines()]


def of(recipe: str) -> list[Command]:
    """The extractions that a recipe shows."""
    return [command for command in shown_in(RECIPES / recipe / "README.md") if command.extracts]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def torchrun(options: Sequence[str], arguments: Sequence[str], *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The program under torchrun; what is left of it at the end is ended."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "nemo_qwen_hidden", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun ends its ranks when it is asked to end; each of them is the leader of a session of its own."""
    if process.poll() is not None:
        return
    ranks = _children(process.pid)
    process.terminate()
    try:
        process.wait(GRACE_SECS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def finish(process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    """Waits until the process has ended well; raises with what it said otherwise."""
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        status = None
    if status != 0:
        said = log.read_text(errors="replace")[-3000:]
        raise AssertionError(f"{process.args} ended with {status}:\n{said}")


def under_torchrun(rank: Rank, port: int) -> dict[str, str]:
    """The environment that torchrun gives a rank."""
    return {
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.world),
        "LOCAL_WORLD_SIZE": str(rank.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def as_under_torchrun(rank: Rank, script: str, port: int, name: str) -> tuple[str, dict[str, Any]]:
    """Runs a script in the environment that torchrun gives a rank; what it printed, and its dictionary ``name``."""
    os.environ |= under_torchrun(rank, port)
    with redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path(script, run_name="__main__")
    made = {str(key): value.numpy() if isinstance(value, Tensor) else value for key, value in names[name].items()}
    return printed.getvalue(), made
