"""``plan`` for what is not here, and what it refuses."""

import re
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden.cli.main import main
from tests.support.models import TINY, write_documents

WHOLE = (
    "--shape",
    "7B",
    "--gpus",
    "8",
    "--tokens",
    "8192e5",
    "precision=bf16",
    "data.max_tokens=4096",
    "parallel=auto",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def facts(text: str) -> dict[str, str]:
    return {row[1]: row[2].strip() for row in re.finditer(r"^([a-z][a-z ]*?)  +(.*)$", text, re.M)}


def test_a_model_on_gpus_that_are_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WHOLE, "capture.hook_points=[resid_post@13]", "--price", "3"]) == 0
    found = facts(capfd.readouterr().out)
    assert found["model"] == "Qwen2.5-7B, by its published sizes"
    assert found["rows"] == "819,200,000 tokens of 200,000 documents"
    assert found["layout"] == "tp=1 pp=1 dp=8 sp=false: 8 ranks"
    assert found["binds"] == "products, of a rank: 593 TFLOP/s at most"
    assert found["cost"].endswith("hours of GPUs at 3 USD")


def test_the_storage_as_given_binds(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WHOLE, "--disk", "1"]) == 0
    assert facts(capfd.readouterr().out)["binds"] == "store, of the storage: 1 GB/s at most"


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ("tokens.every=8", "102,400,000 tokens"),
        ("tokens=last", "200,000 tokens"),
        ("tokens=mean", "200,000 means"),
        ("tokens.sample=10", "2,000,000 tokens"),
        ("tokens.first=false", "819,000,000 tokens"),
    ],
)
def test_tokens_that_are_not_kept_take_no_bytes(choice: str, kept: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WHOLE, choice]) == 0
    assert facts(capfd.readouterr().out)["kept"] == kept


def test_a_layout_that_does_not_fit_is_said_to_be_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--shape", "72B", "--gpus", "8", "--tokens", "1e9", "precision=bf16"]) == 0
    assert facts(capfd.readouterr().out)["fits"].startswith("no: 200.2 GB a rank, of 72.0 GB")


def test_a_job_here_without_a_price_costs_nothing(
    tiny_folders: dict[Any, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_documents(tmp_path / "data.jsonl", (40, 1, 128))
    arguments = ["plan", f"model.path={tiny_folders[TINY[1]]}", f"data.path={data}"]
    assert main(arguments) == 0
    text = capfd.readouterr().out
    assert "\nestimated, here" in text and "cost" not in facts(text)
    assert main([*arguments, "--gpus", "2", "parallel.tp=2"]) == 0
    assert facts(capfd.readouterr().out)["layout"] == "tp=2 pp=1 dp=1 sp=false: 2 ranks"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--shape", "8B", "--tokens", "9"),
            "`--shape` must be a size of Qwen2.5: 0.5B, 1.5B, 3B, 7B, 14B, 32B, 72B, but is '8B' instead.",
        ),
        (("--shape", "7B"), "`--tokens` must be given with `--shape`, which has no tokenizer, but is None instead."),
        (("--gpus", "12"), "`--gpus` must be 1 to 8, or a multiple of 8, but is 12 instead."),
        (
            (*WHOLE, "model.path=somewhere"),
            "`model.path` must be left out where `--shape` gives the sizes, but is 'somewhere' instead.",
        ),
        (
            (*WHOLE, "tokens.keep=assistant"),
            "`tokens.keep` must be all, last or spans with `--tokens`, which reads no data, but is "
            "'assistant' instead.",
        ),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert capfd.readouterr().err == f"nemo-qwen-hidden: {said}\n"
