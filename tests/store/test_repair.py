"""What is damaged goes, what is whole stays, and the job that made the store makes the rest anew."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError, UserError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import FileEntry
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.upkeep import repair as repair_module
from nemo_qwen_hidden.store.upkeep.repair import repair
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.store.write import place, session
from tests.store.crafted import craft
from tests.store.helpers import LENGTHS, POINT, Made, finish, make_store, tree, write_states, write_tokens

SHARD, OTHER = "resid_post@3/000001.safetensors", "embed/000004.safetensors"
TABLE, LINES = "tokens/000000.safetensors", "tokens/000000.documents.jsonl"


def flip(file: Path, place: int = -1) -> None:
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1
    file.write_bytes(contents)


def extract_again(made: Made, **files: bytes) -> None:
    """What the same extract job does with what it finds: runs the rows that are missing, and no others."""
    with place.locked(made.path):
        found = session.find(made.path)
        assert (found.finished, found.unfinished is not None) == (None, True)
        target = found.unfinished
        assert target is not None
        with session.staging(made.path) as staged:
            write_tokens(staged, LENGTHS)
            session.resume(made.path, target, files, staged=staged)
        write_states(made.path, target, made.states)
        finish(made.path, target)


def files_of(path: Path) -> dict[str, bytes]:
    return {name: contents for name, contents in tree(path).items() if name != "manifest.json"}


def test_nothing_is_wrong(made: Made) -> None:
    before = tree(made.path)
    done = repair(made.path)
    assert (done.shards, done.files, done.command, done.found.findings) == ((), (), None, ())
    assert tree(made.path) == before


@pytest.mark.parametrize(
    ("damaged", "shards", "files"),
    [
        ([SHARD], [(POINT, 1)], []),
        ([SHARD, OTHER], [(HookPoint("embed"), 4), (POINT, 1)], []),
        ([TABLE], [], [TABLE]),
        ([LINES], [], [LINES]),
        ([LINES, TABLE, OTHER], [(HookPoint("embed"), 4)], [LINES, TABLE]),
    ],
)
@pytest.mark.parametrize("how", ["flip", "delete", "truncate"])
def test_damage_is_made_anew_and_nothing_else(
    made: Made, damaged: Sequence[str], shards: Any, files: Any, how: str
) -> None:
    before = files_of(made.path)
    whole = {file: (made.path / file).stat().st_ino for file in before if (made.path / file).is_file()}
    for file in damaged:
        path = made.path / file
        {"flip": flip, "delete": os.unlink, "truncate": lambda path: os.truncate(path, 70)}[how](path)
    done = repair(made.path)
    assert (list(done.shards), list(done.files)) == (shards, files)
    with pytest.raises(StoreNotFoundError, match="still being made, or was left unfinished"):
        open_store(made.path)
    extract_again(made)
    assert files_of(made.path) == before
    assert verify(made.path, full=True).findings == ()
    kept = {file for file, inode in whole.items() if (made.path / file).stat().st_ino == inode}
    assert kept >= whole.keys() - set(damaged)


def test_the_final_norm_is_made_anew(made: Made) -> None:
    contents = (craft(made.path.parent / "other").path / "final_norm.safetensors").read_bytes()
    entry = FileEntry(file="final_norm.safetensors", bytes=len(contents), sha256=hashlib.sha256(contents).hexdigest())
    (made.path / entry.file).write_bytes(contents)
    (made.path / "manifest.json").write_bytes(replace(made.manifest, final_norm=entry).to_json())
    flip(made.path / entry.file)
    assert repair(made.path).files == (entry.file,)
    assert not (made.path / entry.file).exists()
    extract_again(made, **{entry.file: contents})
    assert verify(made.path, full=True).findings == ()


BEYOND = {
    "manifest": ("resid_post@1", "must be a new folder, an empty one or a store; this one holds `resid_post@1`"),
    "foreign": ("notes.txt", "must be a new folder, an empty one or a store; this one holds `notes.txt`"),
    "unlisted": (
        "embed/000009.safetensors",
        "must be right or be taken away by hand; no job makes it, but is 'must be ",
    ),
}


@pytest.mark.parametrize(("file", "rule"), BEYOND.values(), ids=BEYOND)
def test_what_no_job_makes_anew(made: Made, file: str, rule: str) -> None:
    (made.path / file).write_text("x")
    flip(made.path / SHARD)
    before = tree(made.path)
    with pytest.raises(StoreError, match=rule.replace("(", r"\(")):
        repair(made.path)
    assert tree(made.path) == before


def test_of_several_parts_only_the_first_gets_its_table_anew(tmp_path: Path) -> None:
    store = craft(tmp_path / "store", parts=((LENGTHS, 5), ((6, 1), 2))).path
    flip(store / "tokens/000001.safetensors")
    flip(store / "tokens/000001.documents.jsonl")
    before = tree(store)
    with pytest.raises(UserError, match="of several parts only the first gets its token table anew") as caught:
        repair(store)
    assert len(str(caught.value).splitlines()) == 2
    assert tree(store) == before


def test_labels_are_beyond_repair(tmp_path: Path) -> None:
    model = {"architecture": {"num_layers": 3, "hidden_size": 6}}
    store = craft(tmp_path / "store", model=model).path
    with pytest.raises(UserError, match="must be right, since it says what to make anew"):
        repair(store)


def test_an_unfinished_job_comes_first(made: Made) -> None:
    flip(made.path / SHARD)
    repair(made.path)
    before = tree(made.path)
    with pytest.raises(StoreNotFoundError, match="still being made"):
        repair(made.path)
    assert tree(made.path) == before


def test_while_another_job_adds_to_it(made: Made) -> None:
    with place.locked(made.path), pytest.raises(StoreError, match="no other run is working on"):
        repair(made.path)
    with place.locked(made.path):
        session.start(made.path, made.manifest, {}, fresh=False)
    flip(made.path / SHARD)
    with pytest.raises(StoreError, match="must be a store that no unfinished job is adding to; extract goes on"):
        repair(made.path)


@pytest.mark.parametrize("step", ["remove", "start"])
def test_a_crash_leaves_what_can_be_repaired(made: Made, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a store that looks whole and holds what is damaged."""
    for file in (SHARD, TABLE):
        flip(made.path / file)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "remove":
            patch.setattr(repair_module, "remove", crash)
        else:
            patch.setattr(repair_module.session, "start", crash)
        with pytest.raises(KeyboardInterrupt):
            repair(made.path)
    assert {finding.file for finding in verify(made.path, full=True).findings} == {SHARD, TABLE}
    repair(made.path)
    extract_again(made)
    assert verify(made.path, full=True).findings == ()


ALL = ["embed", "resid_post@0", "resid_post@3", "final_norm"]
COMMANDS: dict[str, tuple[tuple[dict[str, Any], ...], list[str] | None]] = {
    "as-it-was": (
        ({"command": ["x", "extract", "store.overwrite=true", "store.path=old", "parallel.tp=2"], "hook_points": ALL},),
        ["x", "extract", "parallel.tp=2", "store.path=PATH"],
    ),
    "hook-points-added": (
        (
            {"command": ["x", "extract", "capture.hook_points=[embed]", "store.path=a"], "hook_points": ["embed"]},
            {"command": ["x", "extract", "store.add=hook_points"], "hook_points": ALL[1:]},
        ),
        ["x", "extract", "store.path=PATH", "store.add=hook_points", "capture.hook_points=[resid_post@3]"],
    ),
    "config": (
        ({"command": ["x", "extract", "--config", "a.yaml"], "hook_points": ALL},),
        ["x", "extract", "--config", "a.yaml", "store.path=PATH", "store.overwrite=false"],
    ),
    "not-known": (({"layout": {}},), None),
    "nobody": ((), None),
}


@pytest.mark.parametrize(("producers", "command"), COMMANDS.values(), ids=COMMANDS)
def test_the_command_that_makes_it_anew(
    tmp_path: Path, producers: tuple[dict[str, Any], ...], command: list[str] | None
) -> None:
    made = make_store(tmp_path / "store", producers=producers)
    flip(made.path / SHARD)
    done = repair(made.path)
    expected = command and tuple(word.replace("PATH", str(made.path)) for word in command)
    assert done.command == expected
