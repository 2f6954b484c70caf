"""A folder that ``convert`` writes is there whole or not at all, and a run that was ended stands in nobody's way."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_qwen_hidden.conversion import convert
from nemo_qwen_hidden.errors import CheckpointError
from nemo_qwen_hidden.progress import Event, Phase
from tests.support.crafted_nemo import craft
from tests.support.models import TINY, Tiny

COMPARING = Phase("comparing the weights")


@pytest.fixture
def nemo(tiny_folders: dict[Tiny, Path], tmp_path: Path) -> Path:
    return craft(tiny_folders[TINY[1]], tmp_path / "nemo")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_left_of_a_conversion_that_is_interrupted(nemo: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event == COMPARING:
            assert names(tmp_path) == [".back.converting", "nemo"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(nemo), str(tmp_path / "back"), report=interrupt)
    assert names(tmp_path) == ["nemo"]


def test_what_a_killed_conversion_has_left_is_swept_away_by_the_next(nemo: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal
from nemo_qwen_hidden.conversion import convert
from nemo_qwen_hidden.progress import Phase

def kill(event):
    if event == {COMPARING!r}:
        os.kill(os.getpid(), signal.SIGKILL)

convert({str(nemo)!r}, {str(tmp_path / "back")!r}, report=kill)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".back.converting", "nemo"]
    (tmp_path / ".back.converting" / "deeper").mkdir()
    (tmp_path / ".back.converting" / "deeper" / "file").touch()
    convert(str(nemo), str(tmp_path / "back"))
    assert names(tmp_path) == ["back", "nemo"]
    assert "deeper" not in names(tmp_path / "back")


def test_two_conversions_do_not_write_the_same_folder(nemo: Path, tmp_path: Path) -> None:
    (tmp_path / ".back.converting").mkdir()
    (tmp_path / ".back.converting" / "file").touch()
    held = os.open(tmp_path / ".back.converting", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match=r"`TARGET` must be a folder that no other conversion writes"):
        convert(str(nemo), str(tmp_path / "back"))
    os.close(held)
    assert names(tmp_path) == [".back.converting", "nemo"]
    assert names(tmp_path / ".back.converting") == ["file"]


def test_a_target_that_appears_meanwhile_is_left_as_it_is(nemo: Path, tmp_path: Path) -> None:
    def appear(event: Event) -> None:
        if event == COMPARING:
            (tmp_path / "back").mkdir()
            (tmp_path / "back" / "file").touch()

    with pytest.raises(CheckpointError, match="`TARGET` must not be there yet"):
        convert(str(nemo), str(tmp_path / "back"), report=appear)
    assert names(tmp_path) == ["back", "nemo"] and names(tmp_path / "back") == ["file"]


def test_a_disk_that_fills_up_is_named_and_nothing_is_left(nemo: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; safetensors says that in its own words."""
    command = [sys.executable, "-m", "nemo_qwen_hidden", "convert", str(nemo), str(tmp_path / "back"), "--quiet"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ended = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=120)
    (line,) = ended.stderr.splitlines()
    assert "`TARGET` must have room for the model (File too large)" in line
    assert ended.returncode == 2
    assert names(tmp_path) == ["nemo"]
