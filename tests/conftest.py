"""Fixtures that all rooms share."""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Examples take as long as the machine lets them.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

Start = Callable[..., list[Any]]


@pytest.fixture
def start_ranks(tmp_path: Path) -> Start:
    """``start_ranks(world, target, *args)``: what ``target(rank, *args)`` returned on each rank."""
    from nemo_qwen_hidden.parallel.launch import run_ranks

    def start(world: int, target: Callable[..., Any], *args: Any) -> list[Any]:
        return run_ranks(target, args, world=world, log=tmp_path / "ranks.log")

    return start


@pytest.fixture
def start_python() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts ``code`` in a process of its own, with pipes; it is ended and waited for after the test."""
    from tests.store.helpers import python_command

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


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Folders of the models in ``TINY``."""
    from tests.support.models import TINY, save_tiny

    root = tmp_path_factory.mktemp("tiny")
    return {tiny: save_tiny(root / tiny.name, tiny) for tiny in TINY}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Whatever starts ranks is marked so."""
    for item in items:
        if "start_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("distributed")
