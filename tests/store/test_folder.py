"""What is not ours is never deleted, followed or written over; a place that cannot hold a store is refused."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.folder import survey
from nemo_qwen_hidden.store.write import place, session
from tests.store.helpers import begin, finish, make_store, python, tree, truth, unfinished, write_states

NEW = "must be a new folder, an empty one or a store; this one holds "


@pytest.mark.parametrize("where", ["finished", "unfinished", "bare"])
@pytest.mark.parametrize(
    "name", ["notes.txt", "tokens/notes.txt", "embed/000000.safetensors.bak", "embed/x/y", "mine/a", "resid_post@01/a"]
)
def test_a_foreign_file_is_never_deleted(tmp_path: Path, where: str, name: str) -> None:
    path = tmp_path / "store"
    if where == "finished":
        make_store(path)
    elif where == "unfinished":
        unfinished(path)
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("precious")
    before = tree(path)
    with pytest.raises(StoreError) as caught:
        place.check_target(path)
    assert caught.value.setting == "store.path" and NEW in str(caught.value)
    assert re.search(
        f"holds `({'|'.join({name, name.split('/')[0], name.rpartition('/')[0]} - {''})})`", str(caught.value)
    )
    with pytest.raises(StoreError):
        begin(path)
    assert tree(path) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", '{"name": "a web app"}'),
        ("manifest.json", "not json"),
        ("unfinished.json", "{}"),
        ("tokens/000000.safetensors", "somebody else's"),
        ("journal/0-ab.jsonl", "somebody else's"),
        ("embed/000000.safetensors", "somebody else's"),
    ],
)
def test_names_like_ours_do_not_make_it_ours(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(StoreError, match=NEW):
        place.check_target(tmp_path)
    with pytest.raises(StoreError, match=NEW), place.locked(tmp_path):
        pass
    assert (tmp_path / name).read_text() == text


def test_a_leftover_of_writing_the_marker_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "unfinished.json.tmp").write_text("{")
    begin(tmp_path)
    assert {name for name in tree(tmp_path) if not name.startswith(("journal", "tokens"))} == {"unfinished.json"}


def test_a_leftover_of_a_lock_is_no_obstacle(tmp_path: Path) -> None:
    """A job that was killed before it began has left its lock alone."""
    (tmp_path / "journal/staged/tokens").mkdir(parents=True)
    (tmp_path / "journal/job.lock").write_text("{")
    make_store(tmp_path)
    assert not (tmp_path / "journal").exists()


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "000000.safetensors").write_text("precious")
    path = tmp_path / "store"
    begin(path)
    (path / "embed").symlink_to(outside)
    with pytest.raises(StoreError, match="this one holds `embed`"):
        place.check_target(path)
    session.discard(path)
    assert "embed" in tree(path)
    assert (outside / "000000.safetensors").read_text() == "precious"


def test_discard_leaves_what_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "store"
    begin(path)
    (path / "embed").mkdir()
    for name in ("run.log", "embed/mine.txt", "embed/000000.safetensors.partial"):
        (path / name).write_text("half")
    assert session.discard(path)
    assert {name for name in tree(path) if not name.startswith("journal")} == {"run.log", "embed", "embed/mine.txt"}


@pytest.mark.parametrize("number", range(8))
def test_a_folder_whose_run_ends_meanwhile_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Marker and journal go while another run looks: it must not take that for a folder that cannot be used."""
    path, scandir, calls = tmp_path / "store", os.scandir, 0
    target = begin(path)

    def scan(folder: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            monkeypatch.setattr(os, "scandir", scandir)
            write_states(path, target, truth(target))
            finish(path, target)
            shutil.rmtree(path / "journal")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    contents = survey(path)
    assert contents.foreign == () and (contents.finished or contents.marker is not None)


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_store(tmp_path / "link")
    assert (tmp_path / "real/manifest.json").exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "proc"])
def test_a_path_that_cannot_be_a_folder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    path, message = {
        "file": (tmp_path / "file", "must be a folder, but"),
        "below a file": (tmp_path / "file/a/b", f"must lie in a folder, and {tmp_path / 'file'} is none, but"),
        "dangling link": (tmp_path / "link", "must be a folder, but"),
        "proc": (Path("/proc/a/b"), "must be a folder that can be made and written"),
    }[kind]
    for call in (place.check_target, begin):
        with pytest.raises(StoreError) as caught:
            call(path)
        assert caught.value.setting == "store.path" and message in str(caught.value)


DENIED = """
import os, sys
from pathlib import Path
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.write import place, session
os.umask(0)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for path in (Path(sys.argv[1]) / "closed", Path(sys.argv[1]) / "closed/new", Path(sys.argv[1]) / "secret/new"):
    try:
        place.check_target(path)
        print("allowed")
    except StoreError as error:
        print(error)
"""


def test_a_folder_without_the_right_to_write() -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in folders that only this user may enter
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0o555)
        (folder / "secret").mkdir(mode=0o000)
        said = python(DENIED, folder)
    assert len(said) == 3
    for line in said:
        assert line.startswith("`store.path` must be a folder that can be made and written (Permission denied), but is")
