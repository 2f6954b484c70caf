"""Short tortures; ``make torture`` is a long one."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(module: str, *arguments: object) -> None:
    """In a process of its own: both fork, and the harness has no torch."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no promise broken" in done.stdout.splitlines()[-1]


@pytest.mark.distributed
def test_a_dozen_kills_of_ranks_and_their_starter_break_no_promise(tmp_path: Path) -> None:
    run("tests.torture", "--kills", 12, "--seed", 5, "--folder", tmp_path)


def test_kills_at_calls_of_the_store_break_no_promise() -> None:
    run("tests.torture.every_call", "--seed", 3, "--step", 15)
