"""The life of a store being made: nothing is claimed early, nothing of others is deleted, errors name the setting."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nemo_qwen_hidden.errors import CoverageError, StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store import session
from nemo_qwen_hidden.store.manifest import Manifest
from tests.store.helpers import Made, begin, make_store, tree, unfinished

NEW = "must be a new folder, an empty one or a store; this one holds "


def test_a_store_is_made(made: Made) -> None:
    points = ("embed", "resid_post@0", "resid_post@3", "final_norm")
    names = [f"{point}/{k:06d}.safetensors" for point in points for k in range(5)]
    names += [*points, "tokens", "manifest.json", "tokens/000000.safetensors", "tokens/000000.documents.jsonl"]
    assert set(tree(made.path)) == set(names)
    assert Manifest.from_json((made.path / "manifest.json").read_bytes()) == made.manifest
    for entry in made.manifest.hook_points:
        for shard in entry.shards:
            assert (made.path / shard.file).stat().st_size == shard.bytes
            values = load_file(made.path / shard.file)[str(entry.point)]
            assert values.equal(made.states[entry.point][shard.first_row : shard.first_row + shard.rows])
    assert [shard.rows for shard in made.manifest.hook_points[0].shards] == [5, 5, 5, 5, 3]


def test_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    replace_file, unlink, rename = os.replace, Path.unlink, os.rename

    def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Any, *arguments: Any, **options: Any) -> Any:
            target = arguments[0] if arguments else path
            seen.append(name if isinstance(target, int) else f"{name} {Path(target).name}")
            return call(path, *arguments, **options)

        return noted

    monkeypatch.setattr(os, "replace", note("replace", replace_file))
    monkeypatch.setattr(os, "rename", note("rename", rename))
    monkeypatch.setattr(Path, "unlink", note("unlink", unlink))
    monkeypatch.setattr(os, "fsync", note("fsync", os.fsync))
    make_store(tmp_path / "store")
    after = seen[max(i for i, what in enumerate(seen) if what.startswith("rename 000")) :]
    assert [what.split()[0] for what in after] == [
        "rename",
        "fsync",
        "fsync",
        "fsync",
        "replace",
        "fsync",
        "unlink",
        "fsync",
    ]
    assert after[4] == "replace manifest.json" and after[6] == "unlink unfinished.json"


def test_checking_leaves_everything_as_it_is(tmp_path: Path) -> None:
    session.check_target(tmp_path / "a/b/c", overwrite=False)
    session.check_target(tmp_path, overwrite=False)
    session.check_target(tmp_path, overwrite=True)
    assert tree(tmp_path) == {}


def test_begin_marks_the_folder(tmp_path: Path) -> None:
    begin(tmp_path / "a/b")
    marker = json.loads((tmp_path / "a/b/unfinished.json").read_text())
    assert marker["description"] == {"command": "test"} and marker["pid"] == os.getpid()
    assert set(tree(tmp_path / "a/b")) == {"unfinished.json"}


def test_a_finished_store_is_replaced_only_when_told(made: Made) -> None:
    before = tree(made.path)
    for call in (session.check_target, lambda path, overwrite: begin(path, overwrite=overwrite)):
        with pytest.raises(StoreError) as caught:
            call(made.path, overwrite=False)
        assert str(caught.value) == (
            f"`store.overwrite` must be true to replace the finished store at {made.path}, but is False instead."
        )
    assert tree(made.path) == before
    session.check_target(made.path, overwrite=True)
    assert tree(made.path) == before
    begin(made.path, overwrite=True)
    assert set(tree(made.path)) == {"unfinished.json"}


def test_an_unfinished_store_is_started_again_only_when_told(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "store")
    before = tree(path)
    said = rf"`store.overwrite` must be true to start again the unfinished store at {path} "
    said += rf"\(begun \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 by process {os.getpid()} on .+\), but is False instead\."
    with pytest.raises(StoreError) as caught:
        session.check_target(path, overwrite=False)
    assert re.fullmatch(said, str(caught.value))
    assert tree(path) == before
    begin(path, overwrite=True)
    assert set(tree(path)) == {"unfinished.json"}


def test_discard_takes_away_what_begin_made(tmp_path: Path) -> None:
    session.discard(tmp_path / "store")
    session.discard(unfinished(tmp_path / "store"))
    assert tree(tmp_path) == {}
    (tmp_path / "found").mkdir()
    session.discard(unfinished(tmp_path / "found"))
    assert set(tree(tmp_path)) == {"found"}


def test_discard_after_a_second_start_still_knows_who_made_the_folder(tmp_path: Path) -> None:
    unfinished(tmp_path / "store")
    begin(tmp_path / "store", overwrite=True)
    session.discard(tmp_path / "store")
    assert tree(tmp_path) == {}


def test_discard_refuses_a_finished_store(made: Made) -> None:
    before = tree(made.path)
    with pytest.raises(StoreError, match="must be an unfinished store to be discarded"):
        session.discard(made.path)
    assert tree(made.path) == before


def test_space(tmp_path: Path) -> None:
    session.check_space(tmp_path / "a/b", 1000)
    with pytest.raises(StoreError) as caught:
        session.check_space(tmp_path / "a/b", 10**18)
    assert re.fullmatch(
        rf"`store.path` must be on a disk with 1000\.0 PB free, and [0-9.]+ [kMGT]B are free there, "
        rf"but is '{tmp_path}/a/b' instead\.",
        str(caught.value),
    )


def test_space_counts_what_the_earlier_store_gives_back(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        f_bavail, f_frsize = 10, 1000

    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    held = sum(path.stat().st_blocks * 512 for path in made.path.rglob("*") if path.is_file())
    session.check_space(made.path, 10_000 + held)
    with pytest.raises(StoreError, match="must be on a disk with"):
        session.check_space(made.path, 10_001 + held)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({(HookPoint("embed"), 4): 2}, "embed, shard 4: 2 of 3 rows"),
        ({(HookPoint("resid_post", 3), 0): 6}, "resid_post@3, shard 0: 6 of 5 rows"),
        ({(HookPoint("resid_post", 2), 0): 5}, "resid_post@2, shard 0: 5 of 0 rows"),
        ({(HookPoint("embed"), k): 0 for k in range(5)} | {(HookPoint("final_norm"), 1): 0}, "and 1 more shards"),
    ],
)
def test_finish_wants_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[Any, int], said: str
) -> None:
    finish = session.finish
    monkeypatch.setattr(
        session, "finish", lambda path, manifest, written: finish(path, manifest, written=written | change)
    )
    with pytest.raises(CoverageError, match=f"not every row was written exactly once: .*{said}"):
        make_store(tmp_path / "store")
    assert not (tmp_path / "store/manifest.json").exists()
    assert (tmp_path / "store/unfinished.json").exists()
    assert not list((tmp_path / "store").rglob("0*.safetensors"))[1:]  # the token table alone has its final name


@pytest.mark.parametrize("spoil", ["header", "size"])
def test_finish_wants_the_files_that_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    finish = session.finish

    def spoiled(path: Path, manifest: Manifest, *, written: session.Written) -> Manifest:
        with open(path / "resid_post@0/000001.safetensors.partial", "r+b") as file:
            file.truncate(100) if spoil == "size" else file.write(b"\x01")
        return finish(path, manifest, written=written)

    monkeypatch.setattr(session, "finish", spoiled)
    with pytest.raises(CoverageError, match=r"resid_post@0/000001.safetensors.partial was changed by something else"):
        make_store(tmp_path / "store")
    assert not (tmp_path / "store/manifest.json").exists()


def test_a_manifest_that_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="documents in all"):
        make_store(tmp_path / "store", documents=77)
    assert not (tmp_path / "store/manifest.json").exists()


FULL = """
import sys
from pathlib import Path
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store import session
from nemo_qwen_hidden.store.manifest import Manifest
path = Path(sys.argv[1]) / "store"
session.begin(path, {}, overwrite=False)
manifest = Manifest(rows=0, documents=0, hidden_size=1, shard_rows=1, compute_dtype="fp32", stored_dtype="fp32",
                    hook_points=(), tokens=(), data={"x": "y" * 2_000_000})
try:
    session.finish(path, manifest, written={})
except StoreError as error:
    print(error)
print(sorted(found.name for found in path.iterdir()))
session.discard(path)
print(path.exists())
"""


def test_no_space_for_the_manifest_claims_nothing(small_disk: Callable[..., list[str]]) -> None:
    said = small_disk(FULL)
    assert said[0].startswith(
        "`store.path` must have room for the store (No space left on device while writing manifest"
    )
    assert said[1:] == ["['unfinished.json']", "False"]


def test_a_store_without_rows_can_be_made(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", lengths=())
    assert made.manifest.rows == 0 and made.manifest.hook_points[0].shards == ()


def test_a_crash_between_manifest_and_marker_is_a_finished_store(made: Made) -> None:
    session_marker = {"format": "nemo_qwen_hidden.unfinished", "version": 1}
    (made.path / "unfinished.json").write_text(json.dumps(session_marker))
    with pytest.raises(StoreError, match="must be true to replace the finished store"):
        session.check_target(made.path, overwrite=False)
