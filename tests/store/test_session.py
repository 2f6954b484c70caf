"""The life of a store being made: nothing is claimed early, nothing of others is deleted, a crash costs work alone."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_qwen_hidden.errors import CoverageError, StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.write import journal, place, session
from tests.store.helpers import (
    LAYERS,
    LENGTHS,
    POINT,
    POINTS,
    ROWS,
    Made,
    begin,
    draft,
    finish,
    make_store,
    seal_all,
    tree,
    truth,
    unfinished,
    write_states,
    write_tokens,
)

TOKENS = ("tokens", "tokens/000000.safetensors", "tokens/000000.documents.jsonl")
BEGUN = {"unfinished.json", "journal", "journal/job.lock", "journal/ranks.lock", *TOKENS}


def resumed(path: Path, **changes: Any) -> Manifest:
    """Everything that one run does with what it finds."""
    with place.locked(path):
        target = session.find(path).unfinished
        assert target is not None
        with session.staging(path) as staged:
            write_tokens(staged, LENGTHS)
            session.resume(path, target, {}, staged=staged)
        write_states(path, target, truth(target), **changes)
        return finish(path, target)


def test_a_store_is_made(made: Made) -> None:
    points = ("embed", "resid_post@0", "resid_post@3", "final_norm")
    names = [f"{point}/{k:06d}.safetensors" for point in points for k in range(5)]
    assert set(tree(made.path)) == {*names, *points, *TOKENS, "manifest.json"}
    assert Manifest.from_json((made.path / "manifest.json").read_bytes()) == made.manifest
    for entry in made.manifest.hook_points:
        for shard in entry.present:
            assert (made.path / shard.file).stat().st_size == shard.bytes
            values = load_file(made.path / shard.file)[str(entry.point)]
            assert values.equal(made.states[entry.point][shard.first_row : shard.first_row + shard.rows])
    assert [shard.rows for shard in made.manifest.hook_points[0].present] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: str) -> None:
    made = make_store(tmp_path / "store", stored_dtype=dtype)
    store = open_store(made.path)
    for point, values in made.states.items():
        if dtype == "int8":
            step = values.abs().amax(dim=1, keepdim=True) / 127
            assert bool(((store[point][:] - values).abs() <= step * 0.501).all())
        else:
            assert torch.equal(store[point][:], values)


def test_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Any, *arguments: Any, **options: Any) -> Any:
            named = arguments[0] if arguments else path
            seen.append(name if isinstance(named, int) else f"{name} {Path(named).name}")
            return call(path, *arguments, **options)

        return noted

    for name in ("replace", "rename", "fsync", "unlink"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    make_store(tmp_path / "store")
    after = seen[max(i for i, what in enumerate(seen) if what.startswith("rename 000")) + 1 :]
    assert after == [
        "fsync",  # the folder of the last shards
        "fsync",  # the journal's line
        "fsync",  # the folder
        "fsync",  # the manifest's text
        "replace manifest.json",
        "fsync",
        "unlink unfinished.json",
        "fsync",
        *(what for what in after if what.endswith((".lock", ".jsonl"))),  # the journal goes last
    ]


def test_checking_leaves_everything_as_it_is(tmp_path: Path) -> None:
    place.check_target(tmp_path / "a/b/c")
    place.check_target(tmp_path)
    assert tree(tmp_path) == {}


def test_a_lock_that_nobody_used_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    for name in ("a/b/c", "found"):
        with place.locked(tmp_path / name):
            assert (tmp_path / name / "journal/job.lock").exists()
    assert set(tree(tmp_path)) == {"found"}


def test_a_lock_leaves_a_store_as_it_is(made: Made) -> None:
    before = tree(made.path)
    with place.locked(made.path):
        assert session.find(made.path) == session.Found(
            finished=made.manifest, unfinished=None, begun=session.find(made.path).begun
        )
    assert tree(made.path) == before


def test_start_marks_the_folder(tmp_path: Path) -> None:
    target = begin(tmp_path / "a/b")
    marker = json.loads((tmp_path / "a/b/unfinished.json").read_text())
    assert marker["pid"] == os.getpid()
    assert set(tree(tmp_path / "a/b")) == BEGUN
    assert session.find(tmp_path / "a/b").unfinished == target


def test_start_anew_leaves_nothing_of_before(made: Made, tmp_path: Path) -> None:
    begin(made.path)
    assert set(tree(made.path)) == BEGUN
    unfinished(tmp_path / "other")
    begin(tmp_path / "other")
    assert set(tree(tmp_path / "other")) == BEGUN
    assert journal.read(tmp_path / "other") == journal.Record()


def test_discard_takes_away_what_start_made(tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    for name in ("store", "found"):
        begin(tmp_path / name)
        with place.locked(tmp_path / name):
            assert session.discard(tmp_path / name)
            assert not session.discard(tmp_path / name)
    # the folder of the run that began is a run's no longer when another one discards it
    assert set(tree(tmp_path)) <= {"found", "store"}


def test_discard_keeps_work(tmp_path: Path) -> None:
    unfinished(tmp_path / "store")
    before = tree(tmp_path / "store")
    with place.locked(tmp_path / "store"):
        assert not session.discard(tmp_path / "store")
    after = tree(tmp_path / "store")
    assert {name for name in before if not name.endswith(".lock")} == {
        name for name in after if not name.endswith(".lock")
    }


def test_discard_leaves_the_store_that_was_to_become_larger(made: Made) -> None:
    before = tree(made.path)
    entry = HookPointEntry.of(HookPoint("resid_post", 1), num_layers=LAYERS, shards=5, shape=(6,))
    with place.locked(made.path):
        target = replace(made.manifest, hook_points=(*made.manifest.hook_points, entry))
        session.start(made.path, target, {}, fresh=False)
        (made.path / "resid_post@1").mkdir()
        (made.path / "resid_post@1/000000.safetensors.partial").write_bytes(b"half")
        assert session.discard(made.path)
    assert tree(made.path) == before


def test_a_store_that_becomes_larger_stays_readable(made: Made) -> None:
    entry = HookPointEntry.of(HookPoint("resid_post", 1), num_layers=LAYERS, shards=5, shape=(6,))
    target = replace(made.manifest, hook_points=(*made.manifest.hook_points, entry))
    with place.locked(made.path):
        session.start(made.path, target, {}, fresh=False)
        write_states(made.path, target, {entry.point: made.states[POINT]})
        assert open_store(made.path).manifest == made.manifest
        finish(made.path, target)
    store = open_store(made.path)
    assert torch.equal(store["resid_post@1"][:], made.states[POINT])
    assert torch.equal(store[POINT][:], made.states[POINT])


def test_space(tmp_path: Path) -> None:
    place.check_space(tmp_path / "a/b", 1000)
    with pytest.raises(StoreError) as caught:
        place.check_space(tmp_path / "a/b", 10**18)
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
    place.check_space(made.path, 10_000 + held, replaced=True)
    with pytest.raises(StoreError, match="must be on a disk with"):
        place.check_space(made.path, 10_001 + held, replaced=True)
    with pytest.raises(StoreError, match="must be on a disk with"):
        place.check_space(made.path, 10_001)


def test_rows_that_are_missing_are_named(tmp_path: Path) -> None:
    target = unfinished(tmp_path / "s", rows=[range(0, 9), range(11, ROWS)])
    with pytest.raises(CoverageError, match="2 of embed were not written, the first 9 to 10"):
        session.to_seal(tmp_path / "s", target)
    with pytest.raises(CoverageError, match="shard 0 of embed is not there"):
        session.finish(tmp_path / "s", target)
    assert not (tmp_path / "s/manifest.json").exists() and (tmp_path / "s/unfinished.json").exists()


def test_rows_that_were_written_twice_are_no_store(tmp_path: Path) -> None:
    path = tmp_path / "s"
    target = unfinished(path, rows=[range(ROWS)])
    twice = journal.JournalWriter(path, 1)
    twice.rows({POINT: [(4, 1)]}, {})
    twice.close()
    with pytest.raises(CoverageError, match="some of resid_post@3 were written twice"):
        session.to_seal(path, target)


@pytest.mark.parametrize("spoil", ["header", "size"])
def test_a_shard_that_something_else_changed_is_refused(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "s"
    target = unfinished(path, rows=[range(ROWS)])
    with open(path / "resid_post@0/000001.safetensors.partial", "r+b") as file:
        file.truncate(100) if spoil == "size" else file.write(b"\x01")
    with pytest.raises(CoverageError, match=r"resid_post@0/000001.safetensors.partial was changed by something else"):
        seal_all(path, target)
    assert not (path / "manifest.json").exists()


FULL = """
import sys
from pathlib import Path
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.write import place, session
from tests.store.helpers import draft, empty_part
path = Path(sys.argv[1]) / "store"
with place.locked(path):
    target = draft(empty_part(0))
    session.start(path, target, {})
    object.__setattr__(target, "model", {"x": "y" * 2_000_000})
    try:
        session.finish(path, target)
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
    assert said[1:] == ["['journal', 'tokens', 'unfinished.json']", "False"] or said[1:] == [
        "['journal', 'unfinished.json']",
        "False",
    ]


def test_a_store_without_rows_can_be_made(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", lengths=())
    assert made.manifest.rows == 0 and made.manifest.hook_points[0].shards == ()


# What a crash leaves


def plain(path: Path) -> dict[str, bytes]:
    return {name: held for name, held in tree(path).items() if not name.endswith(".lock")}


def test_a_job_goes_on_where_it_was(tmp_path: Path, shared: Made) -> None:
    """No row is written again, and the store is that of a job that was never disturbed."""
    path = tmp_path / "s"
    unfinished(path, rows=[range(3, 11), range(20, 23)])
    _, done = session.progress(path, session.find(path).unfinished or shared.manifest)
    assert done == dict.fromkeys(POINTS, RowSet([(3, 8), (20, 3)]))
    resumed(path)
    assert tree(path) == tree(shared.path)


@pytest.mark.parametrize("sealed", [0, 1, 3, 20])
def test_shards_that_are_sealed_are_not_sealed_again(tmp_path: Path, shared: Made, sealed: int) -> None:
    path = tmp_path / "s"
    target = unfinished(path, rows=[range(ROWS)])
    record, shards = session.to_seal(path, target)
    session.seal_shards(path, target, shards[:sealed], record.errors, rank=0)
    before = {str(file): file.stat().st_mtime_ns for file in path.glob("*/0*.safetensors")}
    with place.locked(path):
        session.resume(path, target, {})
        assert seal_all(path, target) == shards[sealed:]
        session.finish(path, target)
    assert all(Path(name).stat().st_mtime_ns == written for name, written in before.items())
    assert tree(path) == tree(shared.path)


class Crash(BaseException):
    """The process has gone: nothing of the product runs after it that a caller could see."""


@pytest.mark.parametrize("name", ["replace", "rename", "fsync", "unlink", "mkdir", "pwrite", "rmdir"])
def test_a_crash_at_any_call_loses_no_truth(
    tmp_path: Path, shared: Made, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From a store begun to one finished: the call fails for good at its k-th use, for every k, before it does
    anything; then the next run makes the same store."""
    call, calls, limit = getattr(os, name), 0, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Crash  # and every later one: what a dying process tidies, a crash does not
        return call(*arguments, **options)

    steps = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
    for limit in steps:
        path, calls = tmp_path / f"{name}{limit}", 0
        with monkeypatch.context() as patch, suppress(Crash):
            patch.setattr(os, name, counted)
            make_store(path)
        if calls <= limit:
            break
        shutil.rmtree(path / "journal/staged", ignore_errors=True)
        if path.exists() and not (path / "manifest.json").exists():
            found = session.find(path).unfinished
            if found is None:
                make_store(path)
            else:
                resumed(path)
        elif path.exists():
            with place.locked(path):
                pass
        if path.exists():
            if (path / "unfinished.json").exists():
                resumed(path)
            assert tree(path) == tree(shared.path), (name, limit)


def test_a_shard_renamed_but_not_in_the_journal_is_sealed_again(tmp_path: Path, shared: Made) -> None:
    path = tmp_path / "s"
    unfinished(path, rows=[range(ROWS)])
    file = path / "embed/000002.safetensors.partial"
    file.rename(file.with_suffix(""))
    resumed(path)
    assert tree(path) == tree(shared.path)


@pytest.mark.parametrize("spoil", ["gone", "short", "empty"])
@pytest.mark.parametrize("sealed", [False, True])
def test_what_the_journal_says_of_a_shard_that_has_gone_is_forgotten(
    tmp_path: Path, shared: Made, spoil: str, sealed: bool
) -> None:
    path = tmp_path / "s"
    target = unfinished(path, rows=[range(ROWS)])
    if sealed:
        seal_all(path, target)
    file = next((path / "embed").glob("000002*"))
    if spoil == "gone":
        file.unlink()
    else:
        os.truncate(file, 0 if spoil == "empty" else 300)
    with place.locked(path):
        session.resume(path, target, {})
        _, done = session.progress(path, target)
    assert done == dict.fromkeys(POINTS, RowSet([(0, ROWS)])) | {POINTS[0]: RowSet([(0, 10), (15, 8)])}
    resumed(path)
    assert tree(path) == tree(shared.path)


def test_resuming_makes_the_journal_one_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    target = unfinished(path)
    write_states(path, target, truth(target), [range(11, 13)])
    before = journal.read(path)
    for _ in range(2):
        with place.locked(path):
            session.resume(path, target, {})
        assert len(list((path / "journal").glob("*.jsonl"))) == 1
        assert journal.read(path) == before


def test_a_crash_between_manifest_and_marker_loses_nothing(tmp_path: Path, shared: Made) -> None:
    path = tmp_path / "s"
    target = unfinished(path, rows=[range(ROWS)])
    seal_all(path, target)
    marker = (path / "unfinished.json").read_bytes()
    session.finish(path, target)
    (path / "unfinished.json").write_bytes(marker)
    shards = {file: file.stat().st_mtime_ns for file in path.glob("*/0*.safetensors")}
    resumed(path)
    assert tree(path) == tree(shared.path)
    assert {file: file.stat().st_mtime_ns for file in path.glob("*/0*.safetensors")} == shards


def test_a_crash_after_the_marker_has_gone_leaves_a_store(made: Made) -> None:
    """Its journal has not gone yet: the next run takes it away, and another job does not believe it."""
    before = tree(made.path)
    (made.path / "journal").mkdir()
    stale = journal.JournalWriter(made.path, 0)
    stale.rows({POINT: [(0, ROWS)]}, {})
    stale.close()
    with place.locked(made.path):
        assert session.find(made.path).unfinished is None
    assert tree(made.path) == before


def crash_at(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    monkeypatch.setattr(session, function, crash)


@pytest.mark.parametrize("where", ["_clear", "_put_files", "remove"])
@pytest.mark.parametrize("before", ["finished", "sealed", "half"])
@pytest.mark.parametrize("seed", [7, 8], ids=["same documents", "other documents"])
def test_what_an_overwritten_store_held_is_never_believed(
    tmp_path: Path, shared: Made, monkeypatch: pytest.MonkeyPatch, before: str, where: str, seed: int
) -> None:
    """Another model's states over the same documents, or other documents of the same lengths; a crash while they are
    taken away; then the new job goes on."""
    path = tmp_path / "s"
    other = (POINTS[0], HookPoint("resid_post", 1), *POINTS[1:])
    with place.locked(path), session.staging(path) as staged:
        part, _ = write_tokens(staged, LENGTHS, seed=seed)
        old = draft(part, points=other)
        session.start(path, old, {}, staged=staged)
    write_states(path, old, {point: -values - 1 for point, values in truth(old).items()})
    if before != "half":
        seal_all(path, old)
    if before == "finished":
        session.finish(path, old)  # the journal is still there
    with monkeypatch.context() as patch, suppress(Crash):
        crash_at(patch, where)
        begin(path)
    with place.locked(path), session.staging(path) as staged:
        part, _ = write_tokens(staged, LENGTHS)
        found = session.find(path).unfinished
        if found is None or found.points == other:
            session.start(path, draft(part), {}, staged=staged)
        else:
            session.resume(path, found, {}, staged=staged)
        target = session.find(path).unfinished
        assert target is not None and target.points == POINTS
        write_states(path, target, truth(target))
        finish(path, target)
    assert tree(path) == tree(shared.path)


def test_other_documents_do_not_take_the_place_of_lost_ones(tmp_path: Path) -> None:
    path = tmp_path / "s"
    target = unfinished(path)
    (path / "tokens/000000.safetensors").unlink()
    with place.locked(path), session.staging(path) as staged:
        write_tokens(staged, LENGTHS[::-1])
        with pytest.raises(StoreError, match=r"must give tokens/0+.safetensors the content") as caught:
            session.resume(path, target, {}, staged=staged)
    assert caught.value.setting == "data.path"


def test_a_marker_of_a_later_release_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    text = (tmp_path / "unfinished.json").read_text()
    (tmp_path / "unfinished.json").write_text(text.replace('"version": 1', '"version": 9'))
    with place.locked(tmp_path), pytest.raises(StoreError, match="which this release of nemo_qwen_hidden goes on"):
        session.find(tmp_path)
