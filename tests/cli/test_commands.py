"""The commands from end to end, on a tiny model and ready-made token ids, so that no tokenizer has to be loaded.

Runs in this process share the fork server of all tests; only torchrun imports NeMo anew.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nemo_qwen_hidden import open_store
from nemo_qwen_hidden.cli import known
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.cli.runner import Log
from nemo_qwen_hidden.config import FinetuneSettings
from nemo_qwen_hidden.errors import StoreNotFoundError
from tests.support.models import TINY

DOCUMENTS = [[(7 * n + k) % 380 for k in range(length)] for n, length in enumerate((40, 1, 128, 77, 0, 200, 9))]
ROWS = sum(map(len, DOCUMENTS))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tiny_folders: dict[Any, Path]) -> Path:
    """3 layers of 64 values, 2 query groups."""
    return tiny_folders[TINY[1]]


def write_documents(path: Path, documents: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{n}", "token_ids": ids}) + "\n" for n, ids in enumerate(documents)))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "data.jsonl", DOCUMENTS)


@pytest.fixture
def long_data(tmp_path: Path) -> Path:
    """Enough to be in the middle of for seconds."""
    return write_documents(tmp_path / "long.jsonl", [[n % 380] * 128 for n in range(3000)])


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    """A settings file: two tensor parallel ranks, two hook points, shards of 100 rows."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
defaults:
  - parallel: tp2
model: {{path: {model}}}
capture: {{hook_points: [resid_post@1, final_norm]}}
precision: {{stored: bf16}}
store: {{shard_rows: 100}}
runtime: {{threads: 1}}
"""
    )
    return path


def facts(text: str) -> dict[str, str]:
    """Label and value of every line of a table without a header."""
    return dict(re.findall(r"^(\w+(?: \w+)*)  +(\S.*?) *$", text, re.M))


@pytest.mark.distributed
def test_plan_then_extract_then_inspect(
    recipe: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "out" / "store"
    arguments = ["--config", str(recipe), f"data.path={data}"]

    assert main(["plan", *arguments]) == 0
    planned = facts(capfd.readouterr().out)
    assert planned["rows"] == f"{ROWS} tokens of 7 documents"
    assert planned["layers"] == "3 of 3 are run, in fp32"
    assert planned["layout"] == "tp=2 pp=1 dp=1 sp=false: 2 ranks"
    assert planned["windows"] == "7 of at most 128 tokens"
    assert list(tmp_path.glob("out")) == []

    assert main(["extract", f"store.path={store}", *arguments]) == 0
    out, err = capfd.readouterr()
    phases = ["reading weights", "tokenizing", "starting ranks", "loading weights", "running", "finishing shards"]
    assert err.splitlines() == phases
    done = facts(out)
    assert done["rows"] == planned["rows"]
    assert done["hook points"] == planned["hook points"] == "2: resid_post@1, final_norm"
    assert (tmp_path / "out" / "store.log").is_file()

    opened = open_store(store)
    assert (opened.rows, opened.documents, opened.hook_points) == (ROWS, 7, ("resid_post@1", "final_norm"))
    assert opened.tokens.token_id[:].tolist() == [token for document in DOCUMENTS for token in document]
    shards = list(store.glob("*@*/*.safetensors")) + list(store.glob("final_norm/*.safetensors"))
    assert planned["shards"] == f"{len(shards)}: 5 a hook point, of up to 100 rows"
    size = sum(file.stat().st_size for file in shards) + 12 * ROWS
    assert planned["on disk"] == f"{size / 1000:.1f} kB in bf16"

    assert main(["inspect", str(store)]) == 0
    out, err = capfd.readouterr()
    inspected = facts(out)
    assert err == ""
    assert len(out.splitlines()) <= 40
    assert inspected["rows"] == planned["rows"]
    assert inspected["dtype"] == "bf16 stored, fp32 computed"
    assert inspected["architecture"].startswith("qwen2, layers 3, hidden 64, heads 4, key/value heads 2")
    assert inspected["layout"] == "tp=2 pp=1 dp=1 sp=false"
    assert re.search(r"^final_norm +64 +\[3\] +after the final norm +[0-9.]+ kB", out, re.M)

    assert main(["inspect", "--json", str(store)]) == 0
    everything = json.loads(capfd.readouterr().out)
    assert everything["rows"] == ROWS
    assert everything["model"]["config"]["rms_norm_eps"] == 1e-6
    assert [point["name"] for point in everything["hook_points"]] == ["resid_post@1", "final_norm"]


@pytest.mark.distributed
def test_torchrun_writes_the_same_bytes(
    recipe: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["extract", "--config", str(recipe), "--quiet", f"data.path={data}"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nemo_qwen_hidden"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *arguments, f"store.path={tmp_path}/torchrun"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("extracted")
    assert "NeMo" not in done.stderr
    assert main([*arguments, f"store.path={tmp_path}/own"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("extracted")
    assert err == ""
    own, other = _contents(tmp_path / "own"), _contents(tmp_path / "torchrun")
    assert len(own) == 3 + 2 * 5
    assert own == other


def _contents(store: Path) -> dict[str, bytes]:
    """Shards and token table."""
    files = (path for path in store.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, thread.read_text().split())
    return found


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _wait(condition: Callable[[], object], secs: float = 200) -> None:
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _running(store: Path) -> bool:
    """Whether ranks are writing."""
    return any(path.stat().st_blocks for path in store.glob("*@*/*.partial"))


def in_the_middle(store: Path, act: Callable[[list[int]], None]) -> threading.Thread:
    """Calls ``act`` with the process ids of this process's ranks once they write; starts at once."""

    def wait_and_act() -> None:
        _wait(lambda: _running(store))
        act(_children(forkserver._forkserver._forkserver_pid))  # type: ignore[attr-defined]

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["a rank is killed", "Ctrl-C"])
def test_a_run_that_ends_early(
    how: str, model: Path, long_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line, no rank left alive, and a store that says that it is unfinished."""
    store = tmp_path / "store"
    ranks: list[int] = []

    def act(running: list[int]) -> None:
        ranks.extend(running)
        if how == "a rank is killed":
            os.kill(ranks[-1], signal.SIGKILL)
        else:
            for pid in (*ranks, os.getpid()):  # a terminal sends it to all
                os.kill(pid, signal.SIGINT)

    thread = in_the_middle(store, act)
    arguments = [f"model.path={model}", f"data.path={long_data}", f"store.path={store}", "precision.stored=bf16"]
    status = main(["extract", "--quiet", *arguments, "parallel.tp=2"])
    thread.join()
    out, err = capfd.readouterr()
    goes_on = f"{store} is unfinished; the same command goes on from there"
    said = {
        "a rank is killed": (1, [rf"rank . was ended by SIGKILL, .* \(more in {store}.log\)", goes_on]),
        "Ctrl-C": (130, [f"interrupted: {goes_on}"]),
    }
    assert (status, out) == (said[how][0], "")
    assert re.fullmatch("".join(f"nemo-qwen-hidden: {line}\n" for line in said[how][1]), err)
    assert len(ranks) == 2
    _wait(lambda: not any(map(_exists, ranks)), 10)
    with pytest.raises(StoreNotFoundError, match="still being made, or was left unfinished"):
        open_store(store)


@pytest.mark.distributed
def test_what_only_a_rank_can_see_leaves_nothing_either(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """States too large for fp16, on both ranks; said once."""
    large = Path(shutil.copytree(model, tmp_path / "large"))
    tensors = load_file(large / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * np.float32(1e7)
    save_file(tensors, large / "model.safetensors")
    arguments = [f"model.path={large}", f"data.path={data}", f"store.path={tmp_path}/new/store"]
    status = main(["extract", "--quiet", *arguments, "parallel.tp=2", "precision.stored=fp16"])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert re.fullmatch(r"nemo-qwen-hidden: `precision.stored` must hold every value.*, but is 'fp16' instead.\n", err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "large"]


SLEEPING_RANKS = """
import sys, time
from nemo_qwen_hidden.cli import main, runner
from nemo_qwen_hidden.parallel import launch

def sleep(rank, job, begun):
    (job.store_path / f"{rank.rank}.ready").touch()
    time.sleep(100)

if __name__ == "__main__":
    launch.PRELOAD, runner._started = (), sleep
    sys.exit(main.main(sys.argv[1:]))
"""


def test_ctrl_c_in_a_terminal(model: Path, data: Path, tmp_path: Path) -> None:
    """To the whole process group, and again by an impatient hand; the ranks do nothing, and need no NeMo for it."""
    store, script = tmp_path / "store", tmp_path / "script.py"
    script.write_text(SLEEPING_RANKS)
    arguments = [f"model.path={model}", f"data.path={data}", f"store.path={store}", "parallel.tp=2", "--quiet"]
    with subprocess.Popen(
        [sys.executable, script, "extract", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        _wait(lambda: len(list(store.glob("*.ready"))) == 2 or started.poll() is not None)
        helpers = _children(started.pid)
        ranks = [rank for helper in helpers for rank in _children(helper)]
        os.killpg(started.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(started.pid, signal.SIGINT)
        out, err = started.communicate(timeout=30)
    assert started.returncode in (130, -signal.SIGINT)  # the second may find Python on its way out; a shell sees 130
    assert out == ""
    assert err == f"nemo-qwen-hidden: interrupted: {store} is unfinished; the same command goes on from there\n"
    assert len(ranks) == 2
    _wait(lambda: not any(map(_exists, (*helpers, *ranks))), 10)


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys
from nemo_qwen_hidden.cli.main import main
try:
    main(["extract", "--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "nemo", "numpy", "hydra", "omegaconf", "rich", "transformers", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


HELP = {
    "": ["extract", "plan", "inspect", "torchrun", "examples:", "exit status", "130"],
    "extract": ["--settings", "--config", "model.path=", "capture.hook_points=", "data.path=", "store.path=", "Ctrl-C"],
    "plan": ["--settings", "Loads no weights", "model.path=", "--gpus", "--tokens", "--shape", "examples:"],
    "convert": ["SOURCE", "TARGET", "NeMo 2", "--adapter", "--quiet", "examples:", "docs/checkpoints.md"],
    "inspect": ["--json", "STORE", "open_store"],
    "finetune": [
        "--settings",
        "--plan",
        "run.path=",
        "train.max_steps=",
        "watch.store=",
        "torchrun",
        "last checkpoint",
        "log",
    ],
    "doctor": ["--against", "--documents", "--tokens", "--json", "model.path=", "transformers", "exit status"],
}


@pytest.mark.parametrize(("command", "mentioned"), HELP.items(), ids=[name or "top" for name in HELP])
def test_help(command: str, mentioned: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert [text for text in mentioned if text.lower() not in out.lower()] == []
    assert max(map(len, out.splitlines())) <= 80
    assert set(re.findall(r"([a-z]+\.[a-z_]+)=", out)) <= {*known.kinds(), *known.kinds(FinetuneSettings)}


def test_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["extract", "--settings"])
    assert end.value.code == 0
    assert "store.shard_rows = 65536\n" in capsys.readouterr().out


def test_options_may_stand_between_overrides(model: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = data.with_name("empty.yaml")
    recipe.write_text("{}")
    assert main(["plan", f"model.path={model}", "--config", str(recipe), f"data.path={data}"]) == 0
    assert facts(capfd.readouterr().out)["rows"] == f"{ROWS} tokens of 7 documents"
    for arguments in (["plan", "a.b=1", "--config", str(recipe), "--wrong"], ["inspect", "x", "data.path=y"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert "unrecognized arguments" in capfd.readouterr().err


def test_a_log_is_taken_back_and_so_are_folders_made_for_it(tmp_path: Path) -> None:
    log = Log(tmp_path / "a" / "b" / "store.log")
    log.path.write_text("words")
    log.undo()
    assert list(tmp_path.iterdir()) == []


def test_what_was_in_the_log_before_stays(tmp_path: Path) -> None:
    (tmp_path / "store.log").write_text("before\n")
    log = Log(tmp_path / "store.log")
    with open(log.path, "a") as file:
        file.write("after")
    log.undo()
    assert log.path.read_text() == "before\n"


def test_a_log_where_nothing_can_be_made_beside_the_store() -> None:
    """A store may be given a folder of its own, such as a mount, in one that is not ours."""
    log = Log(Path("/proc/store.log"))
    try:
        assert log.path.is_file()
        assert log.path.suffix == ".log"
    finally:
        log.undo()
    assert not log.path.exists()
