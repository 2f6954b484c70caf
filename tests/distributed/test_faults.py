"""A full disk, a folder that becomes read-only or vanishes: one line that names the setting, everybody ends, and the
same command goes on when the cause is mended.

All in one process in a mount namespace of its own, since NeMo is imported once for it: see ``SCENES``.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.store.helpers import python_command
from tests.support.models import TINY, Tiny, write_documents

pytestmark = pytest.mark.distributed

SCENES = """
import contextlib, io, json, os, shutil, signal, subprocess, sys, threading
from pathlib import Path
from nemo_qwen_hidden.cli.main import main
disk, model, data, results = map(Path, sys.argv[1:])
mount = lambda *words: subprocess.run(["mount", *map(str, words)], check=True)
ballast = disk / "ballast"


def run(name, when=None, then=lambda store: None, **settings):
    # What main says of one run, and whether all its processes have ended; then() happens when when() first holds.
    store, ended = disk / name / "store", threading.Event()
    settings = {"model.path": model, "data.path": data, "store.path": store, "store.shard_rows": 8,
                "store.commit_secs": 0, "data.max_tokens": 50, "data.batch_tokens": 20, "parallel.tp": 2,
                "runtime.threads": 1, "capture.hook_points": "[embed,resid_post@0]"} | settings
    happened = []

    def watch():
        while when is not None and not ended.wait(0.002):
            if when(store):
                then(store)
                happened.append(True)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = io.StringIO()
    signal.alarm(60)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(["extract", "--quiet", *(f"{key}={value}" for key, value in settings.items())])
    signal.alarm(0)
    ended.set()
    watcher.join()
    found = {"status": status, "said": said.getvalue().splitlines(), "happened": bool(happened),
             "left": sorted(path.name for path in store.parent.glob("*"))}
    if status == 0:
        found["same"] = name == "whole" or same(store, disk / "whole/store")
    with open(results, "a") as file:
        print(json.dumps(found), file=file)


def same(left, right):
    held = [{str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*")
             if path.is_file() and path.name != "manifest.json"} for store in (left, right)]
    return held[0] == held[1]


def some_shards(store):
    return len(list(store.glob("*/*.partial"))) > 12


def fill(store):
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def read_only(store):
    # In a mount that nobody has a file open in, put over the store when it is read-only.
    aside = store.with_name("aside")
    aside.mkdir()
    mount("--bind", store, aside)
    mount("-o", "remount,bind,ro", aside)
    mount("--bind", aside, store)


def writable(store):
    for path in (store, store.with_name("aside")):
        subprocess.run(["umount", path], check=True)
    path.rmdir()


def vanish(store):
    # The ranks may put files into folders that are being emptied.
    while store.exists():
        shutil.rmtree(store, ignore_errors=True)


def tear(store):
    for path in [store / "journal", *(path for path in store.iterdir() if path.name not in ("journal", "embed"))]:
        while path.exists():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


run("whole")
run("full", some_shards, fill)
ballast.unlink()
run("full")
(disk / "closed").mkdir()
read_only(disk / "closed")
run("closed")
writable(disk / "closed")
run("closed")
run("closes", some_shards, read_only)
writable(disk / "closes/store")
run("closes")
run("gone", some_shards, vanish)
run("gone")
run("torn", some_shards, tear)
run("torn")
run("moved", some_shards, lambda store: store.rename(store.with_name("elsewhere")))
"""


@pytest.fixture(scope="module")
def scenes(tiny_folders: dict[Tiny, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faults")
    disk = folder / "disk"
    disk.mkdir()
    inside = f'mount -t tmpfs -o size=48m tmpfs {disk} && exec "$@"'
    mount = ["unshare", "-m", "--propagation", "private", "sh", "-c", inside, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("mounting a disk is not permitted here")
    data = write_documents(folder / "documents.jsonl", (31, 1, 57, 17, 23, 2, 90, 40, 61, 28, 35, 44, 12))
    command, environment = python_command(SCENES, disk, tiny_folders[TINY[1]], data, folder / "results")
    command = [part for part in command if part not in ("-W", "error")]  # NeMo's imports warn
    done = subprocess.run([*mount, *command], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    names = [
        "whole",
        "full",
        "mended",
        "closed",
        "opened",
        "closes",
        "reopened",
        "gone",
        "anew",
        "torn",
        "rests",
        "moved",
    ]
    return dict(zip(names, map(json.loads, (folder / "results").read_text().splitlines()), strict=True))


def assert_one_clear_line(found: dict[str, Any], said: str) -> None:
    """Then perhaps one that says what is left; no traceback; the user's mistake to mend."""
    first, *rest = found["said"]
    assert first.startswith("nemo-qwen-hidden: `store.path` ") and said in first, found["said"]
    assert len(rest) <= 1 and all(re.search("goes on from there|left at", line) for line in rest), found["said"]
    assert found["status"] == 2


def test_the_undisturbed_run(scenes: Any) -> None:
    assert scenes["whole"]["status"] == 0, scenes["whole"]


def test_a_full_disk(scenes: Any) -> None:
    assert scenes["full"]["happened"]
    assert_one_clear_line(scenes["full"], "must have room for the store (No space left on device")
    assert scenes["mended"]["status"] == 0 and scenes["mended"]["same"], scenes["mended"]


def test_a_folder_that_cannot_be_written(scenes: Any) -> None:
    assert_one_clear_line(scenes["closed"], "(Read-only file system)")
    assert scenes["opened"]["status"] == 0 and scenes["opened"]["same"], scenes["opened"]


def test_a_folder_that_becomes_read_only(scenes: Any) -> None:
    assert scenes["closes"]["happened"]
    assert_one_clear_line(scenes["closes"], "(Read-only file system")
    assert scenes["reopened"]["status"] == 0 and scenes["reopened"]["same"], scenes["reopened"]


@pytest.mark.parametrize("scene", ["gone", "torn", "moved"])
def test_a_folder_that_vanishes(scenes: Any, scene: str) -> None:
    assert scenes[scene]["happened"]
    assert_one_clear_line(scenes[scene], "must stay where it is while it is written")


def test_what_is_left_of_a_store_is_the_users_to_delete(scenes: Any) -> None:
    assert re.search("what is left at .* delete it before the next run", scenes["torn"]["said"][-1]), scenes["torn"]
    assert "this one holds `embed`" in scenes["rests"]["said"][0], scenes["rests"]


def test_a_store_that_has_vanished_is_started_anew(scenes: Any) -> None:
    assert scenes["anew"]["status"] == 0 and scenes["anew"]["same"], scenes["anew"]
