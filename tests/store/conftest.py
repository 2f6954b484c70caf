"""Stores and processes that end with the test."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.store.helpers import Made, make_store, python, python_command


@pytest.fixture
def start_python() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts ``code`` in a process of its own, with pipes; it is ended and waited for after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
        command, environment = python_command(code, *arguments)
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs ``code`` with a disk of 1 MiB, mounted for that process alone, as its first argument."""
    mount = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")

    def run(code: str, *arguments: object) -> list[str]:
        return python(code, tmp_path, *arguments, before=mount)

    return run


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_store(tmp_path / "store")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store that no test changes."""
    return make_store(tmp_path_factory.mktemp("shared") / "store")
