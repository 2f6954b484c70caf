"""What is not ours is never deleted, followed or written over; a place that cannot hold a store is refused."""

import re
import tempfile
from pathlib import Path

import pytest

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store import session
from tests.store.helpers import begin, make_store, python, tree, unfinished

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
    for overwrite in (False, True):
        with pytest.raises(StoreError) as caught:
            session.check_target(path, overwrite=overwrite)
        assert caught.value.setting == "store.path" and NEW in str(caught.value)
        assert re.search(
            f"holds `({'|'.join({name, name.split('/')[0], name.rpartition('/')[0]} - {''})})`", str(caught.value)
        )
        with pytest.raises(StoreError):
            begin(path, overwrite=overwrite)
    assert tree(path) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", '{"name": "a web app"}'),
        ("manifest.json", "not json"),
        ("unfinished.json", "{}"),
        ("tokens/000000.safetensors", "somebody else's"),
        ("embed/000000.safetensors", "somebody else's"),
    ],
)
def test_names_like_ours_do_not_make_it_ours(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(StoreError, match=NEW):
        session.check_target(tmp_path, overwrite=True)
    session.discard(tmp_path)
    assert (tmp_path / name).read_text() == text


def test_a_leftover_of_writing_the_marker_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "unfinished.json.tmp").write_text("{")
    begin(tmp_path)
    assert set(tree(tmp_path)) == {"unfinished.json"}


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "000000.safetensors").write_text("precious")
    path = unfinished(tmp_path / "store", write=False)
    (path / "embed").symlink_to(outside)
    with pytest.raises(StoreError, match="this one holds `embed`"):
        session.check_target(path, overwrite=True)
    session.discard(path)
    assert set(tree(path)) == {"embed"}
    assert (outside / "000000.safetensors").read_text() == "precious"


def test_discard_leaves_what_is_not_ours(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "store")
    (path / "run.log").write_text("log")
    (path / "embed/mine.txt").write_text("mine")
    session.discard(path)
    assert set(tree(path)) == {"run.log", "embed", "embed/mine.txt"}


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
    for call in (session.check_target, lambda path, overwrite: begin(path, overwrite=overwrite)):
        with pytest.raises(StoreError) as caught:
            call(path, overwrite=True)
        assert caught.value.setting == "store.path" and message in str(caught.value)


DENIED = """
import os, sys
from pathlib import Path
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store import session
os.umask(0)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for path in (Path(sys.argv[1]) / "closed", Path(sys.argv[1]) / "closed/new", Path(sys.argv[1]) / "secret/new"):
    for overwrite in (False, True):
        try:
            session.check_target(path, overwrite=overwrite)
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
    assert len(said) == 6
    for line in said:
        assert line.startswith("`store.path` must be a folder that can be made and written (Permission denied), but is")
