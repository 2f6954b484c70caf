"""``nemo-qwen-hidden doctor`` on ranks, from end to end."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nemo_qwen_hidden.cli.main import main
from tests.support.models import Tiny, save_tiny, write_documents

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("command") / "model", Tiny(layers=3, groups=2, tied=True))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "data.jsonl", (5, 60, 17, 0, 9, 33))


def logs() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("nemo_qwen_hidden-doctor-*"))


def test_a_live_model_is_healthy(folder: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logs()
    settings = [f"model.path={folder}", f"data.path={data}", "parallel.tp=2", "runtime.threads=1"]
    assert main(["doctor", *settings, "--documents", "3", "--tokens", "20"]) == 0
    out, err = capfd.readouterr()
    assert "documents   42 tokens of 3 documents, 5 to 20 of each" in out
    assert out.endswith("\nhealthy\n")
    assert err == "running 42 tokens of 3 documents, 5 to 20 of each on tp=2 pp=1 dp=1 sp=false\n"
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) <= 80
    assert logs() == before


def test_torchrun(folder: Path, data: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nemo_qwen_hidden"]
    settings = [f"model.path={folder}", f"data.path={data}", "parallel.pp=2", "runtime.threads=1"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "doctor", *settings, "--json"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] and report["findings"] == []
    assert report["subject"]["layout"] == "tp=1 pp=2 dp=1 sp=false"
    assert done.stderr.count("running 124 tokens") == 0  # --json says nothing else


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.path=nowhere.txt"], "`data.path` must be"),
        (["parallel.tp=3"], "`parallel.tp` must divide `num_key_value_heads` (2), but is 3"),
        (["--against", "nowhere", "parallel.tp=2"], "`--against` must stand with no setting but `model.path`"),
        (["--against", "nowhere"], "`store` must be the folder of a store"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], says: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"model.path={folder}", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_numbers_are_checked(number: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", f"--documents={number}"])
    assert end.value.code == 2
    assert "must be a whole number of at least 1" in capfd.readouterr().err
