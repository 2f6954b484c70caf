"""From ``model.path`` to a folder: never a long wait, and one line where there is none."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.checkpoint.locate import ANSWER_SECS, locate
from nemo_qwen_hidden.errors import CheckpointError


def test_nothing_is_the_embedded_model() -> None:
    assert (locate(None) / "config.json").is_file()
    assert locate(None) == demo.model_folder()


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert locate("org/name") == Path("org/name")  # before a hub id of that name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/org") == tmp_path / "org"


@pytest.mark.parametrize("path", ["./a", "../a/b", "/no/where", "~/nowhere", "a", "a/b/c", "-a/b", "a/.b"])
def test_what_is_neither_folder_nor_hub_id(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"must be a folder with config.json, or a hub id such as") as caught:
        locate(path)
    assert caught.value.value == path


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be a folder with config.json"):
        locate("org/name")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache that holds org/cached."""
    cached = tmp_path / "cache" / "models--org--cached"
    (cached / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    return tmp_path / "cache"


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """Takes connections and never answers, as behind a bad firewall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def located(hub_ids: list[str], cache: Path, **environment: str) -> list[str]:
    """Folder or error for each, from a new process, which reads the hub's settings from its environment."""
    script = f"""
from nemo_qwen_hidden.checkpoint import locate as module
module.ANSWER_SECS = 0.3
for hub_id in {hub_ids!r}:
    try:
        print(module.locate(hub_id))
    except module.CheckpointError as error:
        print(error)
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


RULE = "`model.path` must be an existing folder or a hub id that can be fetched"


def test_a_hub_that_does_not_answer(cache: Path, silent_hub: str) -> None:
    assert ANSWER_SECS <= 10
    assert located(["org/cached", "org/other"], cache, HF_ENDPOINT=silent_hub) == [
        str(cache / "models--org--cached" / "snapshots" / ("a" * 40)),
        f"{RULE} (no such folder, not in the hub's cache, and the hub cannot be reached), but is 'org/other' instead.",
    ]


def test_offline_by_choice(cache: Path) -> None:
    found, refused = located(["org/cached", "org/other"], cache, HF_HUB_OFFLINE="1")
    assert found.endswith("a" * 40)
    assert refused.endswith("which is all there is with HF_HUB_OFFLINE), but is 'org/other' instead.")


def test_a_name_that_the_hub_would_not_have() -> None:
    with pytest.raises(CheckpointError, match=r"can be fetched \(Cannot have -- or .. in repo_id: 'a/b--c'"):
        locate("a/b--c")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match=r"can be fetched \(No space left on device\), but is 'org/name'"):
        locate("org/name")
