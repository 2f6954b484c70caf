"""The recipe of drift: its commands, run shorter than they stand, go from nothing to pictures."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_qwen_hidden import open_store
from nemo_qwen_hidden.cli.main import main
from tests.recipes import commands
from tests.recipes.commands import RECIPES, ROOT

README = RECIPES / "drift" / "README.md"
SHORTER = ("train.max_steps=2", "train.seq_length=16", "train.global_batch_size=2", "train.micro_batch_size=2")


def test_the_commands_go_from_nothing_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    make, finetune, drift = ([*command.words] for command in commands.shown_in(README))
    (data,) = (number for number, word in enumerate(finetune) if word.startswith("data.path="))
    (tmp_path / "data.txt").write_text("def area(radius):\n    return radius ** 2\n" * 40)
    finetune[data] = f"data.path={tmp_path}/data.txt"

    def here(words: list[str]) -> list[str]:
        return [word.replace("out/drift", str(tmp_path)).replace("recipes/", f"{RECIPES}/") for word in words]

    monkeypatch.setattr(sys, "argv", here(make)[1:])
    runpy.run_path(here(make)[1], run_name="__main__")
    program = ["python", "-m", "nemo_qwen_hidden"]
    assert finetune[:3] == drift[:3] == program
    assert main([*here(finetune)[3:], *SHORTER, "watch.every=2", "train.checkpoint_every=2", "--quiet"]) == 0
    store = open_store(tmp_path / "states")
    assert [(entry.phase, entry.step) for entry in store.steps] == [("probe", 0), ("probe", 2)]
    assert main(here(drift)[3:]) == 0
    names = ("accuracy.png", "drift.json", "norms.png", "similarity.png")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == list(names)


def test_pictures_of_the_documentation_are_small_and_there() -> None:
    for page in (README, ROOT / "README.md"):
        shown = [line.split("](")[1].rstrip(")") for line in page.read_text().splitlines() if line.startswith("![")]
        assert shown
        for name in shown:
            assert (page.parent / name).stat().st_size < 150_000


def test_the_data_of_the_readme_are_there() -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    line = next(line for line in README.read_text().splitlines() if "data.path=" in line).strip().rstrip("\\")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    said = subprocess.run([bash, "-c", f"echo {line}"], check=True, capture_output=True, text=True, env=environment)
    folder = Path(said.stdout.strip().removeprefix("data.path=").removesuffix("/*.py"))
    assert len(list(folder.glob("*.py"))) > 50
