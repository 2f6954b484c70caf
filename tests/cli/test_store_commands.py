"""The commands on stores, in this process: what they print, and their exit status."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.store.write import place, session
from tests.store.crafted import KEPT, PARTS, craft, craft_version_2, rewrite
from tests.store.helpers import make_store

MODEL = {"path": "tiny", "weights_sha256": "1" * 64, "config": {"model_type": "qwen2", "num_hidden_layers": 4}}
COMMANDS = ("inspect", "verify", "repair", "merge", "export")


def facts(text: str) -> dict[str, str]:
    """Label and value of every line of a table without a header."""
    return dict(re.findall(r"^(\w+(?: \w+)*)  +(\S.*?) *$", text, re.M))


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return craft(tmp_path / "store", parts=PARTS, dtype="int8", model=MODEL).path


def flip(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """What went to stdout, of which no line is wider than 80; nothing else was said."""
    out, err = capfd.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "STORE" in out
    assert f"  nemo-qwen-hidden {command} " in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [["verify"], ["merge", "a"], ["export", "a"], ["export", "a", "--to", "csv"]])
def test_what_is_missing_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_what_is_kept_and_its_shape_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = craft_version_2(tmp_path / "store", model=MODEL).path
    assert main(["inspect", str(store)]) == 0
    out = said(capfd)
    assert facts(out)["states"] == f"{len(KEPT)} of 34 rows, pooled (last)"
    assert facts(out)["selection"] == "every=3, spans=[[1, 2]]"
    assert re.search(r"^q@1 +3 x 4 +- +before the final norm", out, re.M)
    assert re.search(r"^resid_post@3 +6 +- +before the final norm", out, re.M)
    assert main(["inspect", "--json", str(store)]) == 0
    everything = json.loads(capfd.readouterr().out)
    assert (everything["states"], everything["pooling"]) == (len(KEPT), "last")
    assert everything["hook_points"][2]["heads"] == [2, 0]
    assert main(["verify", "--full", "--quiet", str(store)]) == 0
    assert facts(said(capfd))["wrong"] == "nothing"
    assert main(["export", str(store), "--to", "npy", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert facts(said(capfd))["rows"] == str(len(KEPT))
    assert np.load(tmp_path / "out/row.npy").tolist() == list(KEPT)


def test_verify_imports_no_torch(store: Path) -> None:
    script = f"""
import sys
from nemo_qwen_hidden.cli.main import main
assert main(["verify", "--full", {str(store)!r}]) == main(["repair", {str(store)!r}]) == 0
heavy = {{"torch", "nemo", "megatron", "transformers", "pyarrow", "datasets", "hydra"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("full", [[], ["--full"]], ids=["fast", "full"])
def test_verify_of_a_whole_store(store: Path, full: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store), *full]) == 0
    out = facts(said(capfd))
    assert out["wrong"] == "nothing"
    assert re.fullmatch(r"50 files, [0-9.]+ [kM]B: (names, sizes and headers .*|every byte)", out["checked"])
    assert main(["verify", str(store), *full, "--json"]) == 0
    report = json.loads(said(capfd).replace("\n", ""))
    assert (report["findings"], report["full"], report["unfinished"]) == ([], bool(full), None)


def test_verify_of_a_damaged_store(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flip(store / "embed/000001.safetensors")
    (store / "final_norm/000003.safetensors").unlink()
    assert main(["verify", str(store)]) == 1
    assert facts(said(capfd))["wrong"] == "1 file"
    assert main(["verify", "--full", str(store)]) == 1
    out = said(capfd)
    assert facts(out)["wrong"] == "2 files"
    assert re.search(r"^embed/000001.safetensors +5 to 9 +must have the SHA-256", out, re.M)
    assert re.search(r"^final_norm/000003.safetensors +15 to 19 +must be a regular file", out, re.M)
    assert main(["verify", "--full", "--json", str(store)]) == 1
    found = json.loads(capfd.readouterr().out)["findings"]
    assert [(each["file"], each["rows"]) for each in found] == [
        ("embed/000001.safetensors", [5, 10]),
        ("final_norm/000003.safetensors", [15, 20]),
    ]


def test_verify_of_much_damage_stays_on_a_screen(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in store.glob("*/*.safetensors"):
        file.unlink()
    assert main(["verify", str(store)]) == 1
    assert re.search(r"^\.\.\. \d+ more", said(capfd), re.M)


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["repair"], ["export", "--to", "npy", "--out", "x"]])
def test_there_is_no_store(command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(tmp_path)]) == 2
    assert capfd.readouterr().err.startswith("nemo-qwen-hidden: `store` must be the folder of a ")
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_to_a_terminal_alone(
    store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert main(["verify", "--full", str(store)]) == 0
    assert "verifying" in capfd.readouterr().err
    assert main(["verify", "--full", "--quiet", str(store)]) == 0
    assert capfd.readouterr().err == ""


def test_repair(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    points = ["embed", "resid_post@0", "resid_post@3", "final_norm"]
    producer = {"command": ["/x/nemo_qwen_hidden/__main__.py", "extract", "store.path=y"], "hook_points": points}
    store = make_store(tmp_path / "store", producers=(producer,)).path
    assert main(["repair", str(store)]) == 0
    assert said(capfd).splitlines()[-1] == "nothing to repair"
    flip(store / "resid_post@0/000002.safetensors")
    assert main(["repair", str(store)]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^resid_post@0/000002.safetensors +10 to 14", out, re.M)
    assert out.endswith(f"\n  python -m nemo_qwen_hidden extract store.path={store}\n")
    assert main(["repair", str(store)]) == 2
    assert "still being made, or was left unfinished" in capfd.readouterr().err


def test_repair_of_what_cannot_be_made_anew(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in ("tokens/000002.safetensors", "tokens/000003.documents.jsonl"):
        flip(store / file)
    assert main(["repair", str(store)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("of several parts only the first gets its token table anew" in line for line in lines)


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    stores = []
    for seed, name in enumerate("ab"):
        store = craft(tmp_path / name, seed=seed, model=MODEL, final_norm=False).path
        lines = store / "tokens/000000.documents.jsonl"
        text = lines.read_text().replace("doc-", f"{name}-id")
        lines.write_text(text)

        def relist(fields: dict[str, Any], text: str = text) -> None:
            entry = fields["parts"][0]["documents_file"]
            entry |= {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}

        rewrite(store, relist)
        stores.append(str(store))
    return stores


def test_merge(two: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / "both"
    assert main(["merge", *two, "--into", str(into)]) == 0
    out = facts(said(capfd))
    assert out["rows"] == "46 tokens of 10 documents in 2 parts"
    assert out["files"] == "44 linked, 0 copied"
    assert verify(into, full=True).findings == ()
    producer = open_store(into).manifest.producers[-1]
    assert (producer["work"], producer["stores"], producer["command"]) == ("merged", two, sys.argv)
    assert main(["merge", *two, "--into", str(into)]) == 0
    assert facts(said(capfd))["files"] == "already there; nothing was left to do"
    assert main(["merge", *two, "--into", str(tmp_path / "copy"), "--copy"]) == 0
    assert facts(said(capfd))["files"] == "0 linked, 44 copied"


def test_merge_says_every_difference(two: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["dtypes"]["compute"] = "bf16"
        fields["model"]["weights_sha256"] = "2" * 64

    rewrite(Path(two[1]), change)
    assert main(["merge", *two, "--into", str(tmp_path / "both")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("`")[1] for line in lines] == [f"{two[1]}: dtypes.compute", f"{two[1]}: model.weights_sha256"]
    assert not (tmp_path / "both").exists()


def test_export(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for to in ("npy", "parquet"):
        out = tmp_path / to
        arguments = ["export", str(store), "--to", to, "--out", str(out), "--hook-points", "embed, resid_post@3"]
        assert main(arguments) == 0
        shown = facts(said(capfd))
        assert (shown["rows"], shown["values"]) == ("34", "float32")
        assert main(arguments) == 2
        assert capfd.readouterr().err == f"nemo-qwen-hidden: `--out` must not be there yet, but is '{out}' instead.\n"
    assert np.load(tmp_path / "npy/embed.npy").shape == (34, 6)
    assert not (tmp_path / "npy/final_norm.npy").exists()
    assert main(["export", str(store), "--to", "npy", "--out", str(tmp_path / "x"), "--hook-points", "embd"]) == 2
    assert "must be one that" in capfd.readouterr().err


def test_inspect_shows_parts_jobs_values_and_what_storing_cost(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewrite(store, lambda fields: fields["producers"].append({"work": "documents added", "started_unix_secs": 1e9}))
    assert main(["inspect", str(store)]) == 0
    out = said(capfd)
    shown = facts(out)
    assert shown["checksums"] == "SHA-256 of 49 files, which `verify --full` compares"
    assert shown["final norm"] == "its weight is stored"
    assert re.search(r"^2 +4 +2 +100 rows", out, re.M)
    assert re.search(r"^documents added +2001-09-09", out, re.M)
    opened = open_store(store)
    known = opened.statistics("resid_post@3")
    row = next(line for line in out.splitlines() if line.startswith("resid_post@3") and "%" in line).split()
    assert row[1:5] == [
        f"{np.sqrt(known.mean_square):.3g}",
        f"{known.max_abs:.4g}",
        f"{known.norm_quantile(0.5):.4g}",
        f"{known.max_norm:.4g}",
    ]
    assert row[5:7] == ["0,", "0"]


def test_inspect_shows_an_unfinished_job(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with place.locked(store):
        session.start(store, open_store(store).manifest, {}, fresh=False)
    assert main(["inspect", str(store)]) == 0
    assert "a store of 34 rows at 4 hook points" in " ".join(said(capfd).split())
    assert main(["verify", str(store)]) == 0
    assert "a store of 34 rows at 4 hook points" in " ".join(said(capfd).split())


def test_inspect_for_programs_says_everything(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(store)]) == 0
    out = json.loads(capfd.readouterr().out)
    assert [part["rows"] for part in out["parts"]] == [23, 0, 4, 7]
    assert (out["files"], out["unfinished"], out["rows"]) == (49, None, 34)
    for point in out["hook_points"]:
        known = open_store(store).statistics(point["name"])
        assert point["rms"] == pytest.approx(np.sqrt(known.mean_square))
        assert point["median_norm"] == known.norm_quantile(0.5)
        assert (point["rows_left_out"], point["nan"], point["inf"]) == (0, 0, 0)
        assert point["error_max"] == 0.009


def test_inspect_of_a_store_without_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = craft(tmp_path / "empty", parts=()).path
    assert main(["inspect", str(path)]) == 0
    assert facts(said(capfd))["rows"] == "0 tokens of 0 documents"
    assert main(["verify", "--full", str(path)]) == 0


def test_control_c_ends_a_verification(
    store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_qwen_hidden.store.upkeep.check_shards.read_header", interrupt)
    assert main(["verify", str(store)]) == 130
    assert capfd.readouterr().err == "nemo-qwen-hidden: interrupted\n"
    assert os.path.exists(store / "manifest.json")
