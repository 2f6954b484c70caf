"""What cannot be done as asked: one line that names setting, rule and value, exit status 2, and nothing written.

All of it runs in this process, and none of it imports NeMo: what ``prepare`` refuses is refused before the fork server
starts, and the rest is found by the process that owns the terminal, for which ``no_server`` stands in for the server.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nemo_qwen_hidden import demo, extract
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.config import DataSettings, ModelSettings, Settings, StoreSettings
from nemo_qwen_hidden.job import prepare
from nemo_qwen_hidden.parallel import launch
from tests.support.models import TINY

pytestmark = pytest.mark.usefixtures("no_launcher")

LAYERS, GROUPS, VOCAB = 5, 4, 383  # of the model that the fixture ``model`` copies


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun around the tests, and no hub."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused before a rank starts needs no fork server to start them from."""

    def no_ranks(*_: object, **__: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launch, "warm_up", lambda log: None)
    monkeypatch.setattr(launch, "run_ranks", no_ranks)


@pytest.fixture
def model(tiny_folders: dict[Any, Path], tmp_path: Path) -> Path:
    """A folder of a tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_folders[TINY[0]], tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three documents as token ids: nothing here needs a tokenizer."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"token_ids": [1, 2, 3 + n]}) + "\n" for n in range(3)))
    return path


Refuses = Callable[..., str]


@pytest.fixture
def refuses(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuses:
    """Runs ``extract`` with these overrides; checks status, silence on stdout, and that nothing has changed on disk.

    Gives the one line that was said, without the program's name.
    """

    def run(*overrides: str, store: str = "new/folder/store") -> str:
        usual = {"model.path": str(model), "data.path": str(data), "store.path": str(tmp_path / store)}
        given = {text.partition("=")[0] for text in overrides}
        arguments = [f"{key}={value}" for key, value in usual.items() if key not in given]
        before = _everything(tmp_path)
        status = main(["extract", *arguments, *overrides])
        captured = capsys.readouterr()
        assert (status, captured.out) == (2, "")
        assert _everything(tmp_path) == before
        lines = captured.err.splitlines()
        lines = [line for line in lines if line not in ("reading weights", "tokenizing")]
        assert len(lines) == 1
        assert lines[0].startswith("nemo-qwen-hidden: ")
        return lines[0].removeprefix("nemo-qwen-hidden: ")

    return run


def _everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below: size and time of change of a file. Who looks into a store signs its lock."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.suffix != ".lock"):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns) if path.is_file() else (-1, -1)
    return found


SETTINGS = {
    "tp-not-dividing": (
        ["parallel.tp=3"],
        f"`parallel.tp` must divide `num_key_value_heads` ({GROUPS}), but is 3 instead.",
    ),
    "tp-zero": (["parallel.tp=0"], "`parallel.tp` must be at least 1, but is 0 instead."),
    "pp-above-layers": (
        ["parallel.pp=6"],
        f"`parallel.pp` must be at most the number of layers that have to run ({LAYERS}), but is 6 instead.",
    ),
    "pp-above-layers-to-run": (
        ["parallel.pp=3", "capture.hook_points=[resid_post@1]"],
        "`parallel.pp` must be at most the number of layers that have to run (2), but is 3 instead.",
    ),
    "sp-without-tp": (
        ["parallel.sp=true"],
        "`parallel.sp` splits the sequence over the tp axis and needs `parallel.tp` of 2 or more, but is True instead.",
    ),
    "layer-L-of-L": (
        ["capture.hook_points=[resid_post@5]"],
        "`capture.hook_points` must name a layer from 0 to 4 (or -5 to -1), but is 'resid_post@5' instead.",
    ),
    "unknown-hook-point": (
        ["capture.hook_points=[attn@1]"],
        "`capture.hook_points` must be at one of the sites embed, resid_pre, q, k, v, rot_q, rot_k, attn_weights, z, "
        "attn_out, resid_mid, mlp_act, mlp_out, resid_post, final_norm, but is 'attn@1' instead.",
    ),
    "no-hook-point": (
        ["capture.hook_points=[]"],
        "`capture.hook_points` must name at least one hook point, but is [] instead.",
    ),
    "unknown-key": (
        ["paralel.tp=2"],
        "`paralel.tp` must be one of the known settings (did you mean `parallel.tp`?), but is 'paralel.tp=2' instead.",
    ),
    "unknown-preset": (
        ["precision=fp8"],
        "`precision` must be one of the presets bf16, default, fp32, fp32_stored_bf16, fp32_stored_int8, but is",
    ),
    "wrong-type": (["parallel.tp=two"], "`parallel.tp` must be a whole number, but is 'two' instead."),
    "unknown-dtype": (
        ["precision.stored=fp8"],
        "`precision.stored` must be one of fp32, bf16, fp16, int8, but is 'fp8' instead.",
    ),
    "max-tokens-above-the-model": (
        ["data.max_tokens=129"],
        "`data.max_tokens` must be at most the model's max_position_embeddings (128), but is 129 instead.",
    ),
    "no-store": (
        ["store.path=null"],
        "`store.path` must name the folder to write the hidden states to, but is None instead.",
    ),
    "no-model-folder": (
        ["model.path=./nowhere"],
        "`model.path` must be a folder with config.json, or a hub id such as `Qwen/Qwen2.5-0.5B`, "
        "but is './nowhere' instead.",
    ),
    "hub-offline": (
        ["model.path=nobody/nothing"],
        "`model.path` must be an existing folder or a hub id that can be fetched (no such folder, and not in the hub's "
        "cache, which is all there is with HF_HUB_OFFLINE), but is 'nobody/nothing' instead.",
    ),
    "no-data": (
        ["data.path=/nowhere/at/all"],
        "`data.path` must be a file, folder or glob that exists, but is '/nowhere/at/all' instead.",
    ),
    "slice-that-is-none": (
        ["tokens.keep=spans", "tokens.spans=[0:4,7]"],
        '`tokens.spans` must hold slices `start:stop` of positions, such as "0:4" or "-3:", in YAML in quotes, '
        "but is '7' instead.",
    ),
    "mask-without-a-field": (
        ["tokens.keep=mask"],
        "`tokens.mask_field` must be given where `tokens.keep` is mask, and only there, but is None instead.",
    ),
    "record-without-its-mask": (
        ["tokens.keep=mask", "tokens.mask_field=keep"],
        "`data.path` must hold 0 or 1 for each token in `keep` (line 1 of ",
    ),
    "config-file-missing": (["--config", "/nowhere.yaml"], "`--config` must be a file that exists, but is "),
}


@pytest.mark.parametrize(("arguments", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting(refuses: Refuses, arguments: list[str], expected: str) -> None:
    assert refuses(*arguments).startswith(expected)


def test_several_mistakes_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "paralel.tp=2", "data.pth=x"]) == 2
    assert [line.partition(" must")[0] for line in capsys.readouterr().err.splitlines()] == [
        "nemo-qwen-hidden: `paralel.tp`",
        "nemo-qwen-hidden: `data.pth`",
    ]


def _config(**changes: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def _tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return spoil


def _indexed(model: Path) -> None:
    """As a set of two files by its index, of which one is there."""
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = load_file(model / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + ('norm' in name)}-of-00002.safetensors" for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def _truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 100)


DOWN = "model.layers.3.mlp.down_proj.weight"
MODELS = {
    "no-config": (lambda model: (model / "config.json").unlink(), "`model.path` must be a model folder with a"),
    "not-json": (lambda model: (model / "config.json").write_text("{"), "`model.path` must have a readable config"),
    "llama": (
        _config(model_type="llama"),
        "`model.path: config.json: model_type` must be 'qwen2' (dense Qwen2 and Qwen2.5), but is 'llama' instead.",
    ),
    "rope-scaling": (
        _config(rope_scaling={"type": "yarn", "factor": 4.0}),
        "`model.path: config.json: rope_scaling` must be absent: scaled rotary embeddings are not reproduced, "
        "but is {'type': 'yarn', 'factor': 4.0} instead.",
    ),
    "quantised": (
        _config(quantization_config={"quant_method": "gptq"}),
        "`model.path: config.json: quantization_config` must be absent: quantised weights are not read, "
        "but is {'quant_method': 'gptq'} instead.",
    ),
    "sliding-window": (
        _config(use_sliding_window=True, sliding_window=64, max_window_layers=2, layer_types=None),
        "`data.max_tokens` must be at most the model's sliding window (64 tokens), but is 128 instead.",
    ),
    "missing-tensor": (
        _tensors(lambda tensors: tensors.pop(DOWN)),
        f"`model.path` must hold the tensor `{DOWN}`, but is ",
    ),
    "wrong-shape": (
        _tensors(lambda tensors: tensors.update({DOWN: np.zeros((64, 127), np.float32)})),
        f"`model.path: {DOWN}` must have shape [64, 128] by config.json, but is [64, 127] instead.",
    ),
    "wrong-dtype": (
        _tensors(lambda tensors: tensors.update({DOWN: np.zeros((64, 128), np.int8)})),
        f"`model.path: {DOWN}` must be one of F32, BF16, F16, but is 'I8' instead.",
    ),
    "missing-file": (
        _indexed,
        "`model.path` must hold `model-00002-of-00002.safetensors`, which its index names, but is ",
    ),
    "truncated": (_truncated, "`model.path` must hold whole safetensors files ("),
    "no-weights": (
        lambda model: (model / "model.safetensors").unlink(),
        "`model.path` must hold model.safetensors or model.safetensors.index.json, but is ",
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), MODELS.values(), ids=MODELS)
def test_a_model(refuses: Refuses, model: Path, spoil: Callable[[Path], None], expected: str) -> None:
    spoil(model)
    assert refuses().startswith(expected)


def test_a_sliding_window_is_no_obstacle_to_shorter_windows(model: Path, data: Path) -> None:
    """The way out that the message shows: ``plan`` takes it."""
    _config(use_sliding_window=True, sliding_window=64, max_window_layers=2, layer_types=None)(model)
    assert main(["plan", f"model.path={model}", f"data.path={data}", "data.max_tokens=64"]) == 0


LATE = {
    "empty-file": (b"", "`data.path` must hold at least one token"),
    "empty-documents": (b'{"token_ids": []}\n', "`data.path` must hold at least one token"),
    "not-utf-8": (
        b'{"token_ids": [1]}\n{"text": "caf\xe9"}\n',
        "`data.path` must be UTF-8 text (byte 13 of line 2 of ",
    ),
    "outside-the-vocabulary": (
        b'{"token_ids": [1, 2]}\n{"token_ids": [3, 383]}\n',
        f"`data.path` must hold token ids from 0 to {VOCAB - 1} (document 'data.jsonl#1', position 1), "
        "but is 383 instead.",
    ),
    "text-without-a-tokenizer": (
        b'{"token_ids": [1]}\n{"text": "hello"}\n',
        "`model.path` must hold a tokenizer (tokenizer.json, or vocab.json and merges.txt; data with `token_ids` ",
    ),
    "empty-message": (
        b'{"token_ids": [1]}\n{"messages": [{"role": "user", "content": ""}]}\n',
        "`data.path` must hold no empty message in `messages` (message 0 of line 2 of ",
    ),
    "text-beside-messages": (
        b'{"token_ids": [1]}\n{"text": "a", "messages": [{"role": "user", "content": "b"}]}\n',
        "`data.path` must hold one of `text`, `token_ids` and `messages` in each record (line 2 of ",
    ),
}


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("content", "expected"), LATE.values(), ids=LATE)
def test_data_found_bad_while_tokenizing(
    refuses: Refuses, data: Path, content: bytes, expected: str, world: int
) -> None:
    data.write_bytes(content)
    assert refuses(f"parallel.tp={world}").startswith(expected)


@pytest.mark.usefixtures("no_server")
def test_a_chat_and_a_model_without_a_template(refuses: Refuses, data: Path, model: Path) -> None:
    data.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.model_folder() / name, model)
    assert refuses("tokens=assistant").startswith("`model.path` must have a chat template for messages (")


@pytest.mark.usefixtures("no_server")
def test_documents_without_an_assistant(refuses: Refuses) -> None:
    expected = "`data.path` must hold chats alone where `tokens.keep` is assistant (document 'data.jsonl#0' holds token"
    assert refuses("tokens=assistant").startswith(expected)


@pytest.mark.usefixtures("no_server")
def test_a_text_file_that_is_not_utf_8(refuses: Refuses, data: Path) -> None:
    data.rename(data.parent / "1.jsonl")
    (data.parent / "2.txt").write_bytes("café".encode("latin-1"))
    assert re.match(
        r"`data.path` must be UTF-8 text \(byte 3 of '.*2.txt' is not", refuses(f"data.path={data.parent}/[12]*")
    )


@pytest.mark.usefixtures("no_server")
def test_no_space_for_the_states(refuses: Refuses, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.write_text(json.dumps({"token_ids": [7] * 1000}))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    line = refuses("precision.stored=bf16", "capture.hook_points=[embed,resid_post@-1]")
    assert re.match(r"`store.path` must be on a disk with 304.0 kB free, and [0-9.]+ kB are free there, but is", line)


@pytest.mark.usefixtures("no_server")
def test_no_space_for_the_token_table(refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        if "tokens" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert refuses().startswith("`store.path` must have room for the store (No space left on device while writing ")


def test_a_folder_that_holds_something_else(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    for overwrite in ("true", "false"):
        assert refuses(f"store.overwrite={overwrite}", store="mine").startswith(
            "`store.path` must be a new folder, an empty one or a store; this one holds `thesis.txt`, part of none, "
        )


def test_an_unfinished_store_of_another_job(refuses: Refuses, tmp_path: Path, model: Path, data: Path) -> None:
    asked = Settings(model=ModelSettings(path=str(model)), data=DataSettings(path=str(data)))
    job = prepare(replace(asked, store=StoreSettings(path=str(tmp_path / "old"))), world=None, for_store=True)
    with extract.locked(job):
        extract.begin(job)
    said = refuses("precision.stored=bf16", store="old")
    assert said.startswith("`precision.stored` must be fp32, as in the unfinished store at ")
    assert "store.overwrite=true starts it again" in said


def test_a_store_that_another_run_is_working_on(refuses: Refuses, tmp_path: Path, model: Path, data: Path) -> None:
    asked = Settings(model=ModelSettings(path=str(model)), data=DataSettings(path=str(data)))
    job = prepare(replace(asked, store=StoreSettings(path=str(tmp_path / "old"))), world=None, for_store=True)
    with extract.locked(job):
        extract.begin(job)
        said = refuses(store="old")
    assert said.startswith("`store.path` must be a store that no other run is working on; process ")


@pytest.mark.usefixtures("no_server")
def test_a_store_for_which_another_run_is_finding_norms(
    refuses: Refuses, tmp_path: Path, model: Path, data: Path
) -> None:
    """The other has only its lock there yet; the norms beside it are its own."""
    asked = Settings(model=ModelSettings(path=str(model)), data=DataSettings(path=str(data)))
    job = prepare(replace(asked, store=StoreSettings(path=str(tmp_path / "new"))), world=None, for_store=True)
    with extract.locked(job):
        (tmp_path / ".new.norms").mkdir()
        (tmp_path / ".new.norms" / "theirs").write_text("norms")
        said = refuses("tokens.max_norm=2", store="new")
    assert said.startswith("`store.path` must be a store that no other run is working on; process ")


@pytest.mark.usefixtures("no_server")
def test_norms_that_a_killed_run_has_left_go(tmp_path: Path, model: Path, data: Path) -> None:
    asked = Settings(model=ModelSettings(path=str(model)), data=DataSettings(path=str(data)))
    job = prepare(replace(asked, store=StoreSettings(path=str(tmp_path / "old"))), world=None, for_store=True)
    with extract.locked(job):
        extract.begin(job)
    (tmp_path / ".old.norms").mkdir()
    arguments = [f"model.path={model}", f"data.path={data}", f"store.path={tmp_path / 'old'}"]
    assert main(["extract", *arguments, "tokens.max_norm=2", "precision.stored=bf16"]) == 2
    assert not (tmp_path / ".old.norms").exists()
    assert (tmp_path / "old").is_dir()


def test_a_path_below_a_file(refuses: Refuses, data: Path) -> None:
    assert refuses(store=f"{data.name}/store").startswith("`store.path` must lie in a folder, and ")


@pytest.mark.parametrize(
    ("trace", "rule"),
    [
        (".", "`profile.trace` must be a file, and no folder"),
        ("{data}/trace.json", "`profile.trace` must lie in a folder that can be made and written"),
        ("out/trace.json", "`profile.trace` must not be the log or lie in the store"),
        ("out", "`profile.trace` must not be the log or lie in the store"),
        ("out.log", "`profile.trace` must not be the log or lie in the store"),
        ("{data}", "`profile.trace` must lie where `data.path` ("),
    ],
)
def test_a_place_for_a_trace(refuses: Refuses, tmp_path: Path, data: Path, trace: str, rule: str) -> None:
    given = tmp_path / trace.format(data=data.name)
    assert refuses(f"profile.trace={given}", store=str(tmp_path / "out")).startswith(rule)


@pytest.mark.parametrize("store", ["corpus/out", "corpus/deep/out"])
@pytest.mark.parametrize("pattern", ["corpus", "corpus/**/*", "corpus/**/*.jsonl"])
def test_a_store_among_the_data(refuses: Refuses, tmp_path: Path, data: Path, pattern: str, store: str) -> None:
    """It would read its own files as documents."""
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    shutil.copy(data, tmp_path / "corpus")
    line = refuses(f"data.path={tmp_path / pattern}", store=store)
    assert line.startswith(f"`store.path` must lie where `data.path` ({tmp_path / pattern}) reads nothing, ")


def test_a_log_among_the_data(refuses: Refuses, data: Path) -> None:
    data.rename(data.with_name("run.log"))
    assert refuses(f"data.path={data.with_name('run.log')}", store="run").startswith("`store.path` must lie where ")


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder in which this process may not write, though it be root's."""
    folder = Path(tempfile.mkdtemp(prefix="nemo_qwen_hidden-"))
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(os.getuid())
        folder.rmdir()


def test_no_right_to_write(read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", f"store.path={read_only}/a/b"]) == 2
    rule = "must be a folder that can be made and written (Permission denied)"
    assert capsys.readouterr().err == f"nemo-qwen-hidden: `store.path` {rule}, but is '{read_only}/a/b' instead.\n"
    assert list(read_only.iterdir()) == []


RANKS = {
    "layout": (["parallel.tp=2"], "`parallel` must divide the number of ranks started (3), but is 'tp=2 x pp=1' "),
    "all-axes": (
        ["parallel.tp=2", "parallel.dp=2"],
        "`parallel` must multiply to the number of ranks started (3), but is 'tp=2 x pp=1 x dp=2' instead.",
    ),
    "not-about-ranks": (["parallel.tp=3"], "`parallel.tp` must divide `num_key_value_heads` (4), but is 3 instead."),
}


@pytest.mark.parametrize(("arguments", "expected"), RANKS.values(), ids=RANKS)
def test_under_torchrun_one_rank_of_a_machine_speaks(
    refuses: Refuses,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(secs: float) -> None:
        raise SystemExit(f"ended by torchrun within {secs} s")

    monkeypatch.setattr("nemo_qwen_hidden.cli.main.time.sleep", end)
    for rank in ("1", "2"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "3"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="ended by torchrun within 10"):
            main(["extract", "store.path=nowhere", *arguments])
        assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert refuses(*arguments).startswith(expected)


def test_torchrun_with_ranks_that_do_not_match(tmp_path: Path) -> None:
    """Said once, and all ranks end; torchrun's own words follow."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nemo_qwen_hidden", "extract"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "parallel.tp=4", f"store.path={tmp_path}/store"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = "`parallel` must divide the number of ranks started (2), but is 'tp=4 x pp=1' instead."
    assert done.returncode != 0
    assert done.stderr.count("nemo-qwen-hidden: ") == 1
    assert f"nemo-qwen-hidden: {said}\n" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_imports_neither_torch_nor_nemo(tmp_path: Path) -> None:
    script = f"""
import sys
from nemo_qwen_hidden.cli.main import main
for overrides in (["paralel.tp=3"], ["parallel.tp=3"], ["parallel.pp=7"], ["capture.hook_points=[resid_post@6]"]):
    assert main(["extract", "store.path={tmp_path}/store", *overrides]) == 2, overrides
heavy = {{"torch", "nemo", "megatron", "lightning", "transformers", "rich", "pyarrow", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len(done.stderr.splitlines()) == 4


def test_inspect_says_what_is_not_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(
        "nemo-qwen-hidden: `store` must be the folder of a store, with a manifest"
    )


def test_plan_refuses_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "parallel.tp=3"]) == 2
    assert capsys.readouterr().err.startswith("nemo-qwen-hidden: `parallel.tp` must divide ")
