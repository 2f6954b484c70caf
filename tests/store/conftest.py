"""Stores, and a small disk."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.helpers import Made, make_store, python


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
