"""What docs/finetuning.md shows of a plan is what the command says."""

import re
from pathlib import Path

import pytest

from nemo_qwen_hidden.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
OF_THE_MACHINE = ("run", "model", "data", "room")


def lines(text: str) -> list[str]:
    """But for those that have a path of the machine, or what its disk has free."""
    shown = [line.rstrip() for line in text.splitlines()]
    return [line for line in shown if line.split("  ")[0] not in OF_THE_MACHINE and not line.startswith(" " * 10)]


def test_the_plan_that_is_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    found = re.search(
        r"    nemo-qwen-hidden (finetune --plan .*)\n\n```\n((?s:.*?))```", (ROOT / "docs/finetuning.md").read_text()
    )
    assert found is not None
    config = str(ROOT / "recipes/finetune_capture/config.yaml")
    monkeypatch.chdir(tmp_path)
    assert main([config if word.endswith(".yaml") else word for word in found[1].split()]) == 0
    assert lines(found[2]) == lines(capfd.readouterr().out)


def test_runs_of_the_embedded_model_that_are_shown_can_be_run(capfd: pytest.CaptureFixture[str]) -> None:
    """As far as a plan can tell, which counts the embedded text."""
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    shown = capfd.readouterr().out + (ROOT / "docs/finetuning.md").read_text()
    examples = re.findall(r"^ +nemo-qwen-hidden finetune (.*run\.path=.*)$", shown.replace("\\\n", ""), re.M)
    assert len(examples) == 4
    for example in examples:
        assert main(["finetune", "--plan", *example.split()]) == 0
