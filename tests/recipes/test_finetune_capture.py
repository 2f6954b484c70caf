"""The fine-tuning recipe: its commands fit their ranks, and it runs as it stands."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from nemo_qwen_hidden.cli.compose import compose_finetuning
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.training.job import prepare
from tests.recipes.commands import RECIPES, ROOT

RECIPE = RECIPES / "finetune_capture"
CONFIG = "recipes/finetune_capture/config.yaml"


def commands() -> list[list[str]]:
    lines = (RECIPE / "README.md").read_text().splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    ") and CONFIG in line]


def test_commands_fit_their_ranks_and_the_embedded_model() -> None:
    assert len(commands()) == 3
    for words in commands():
        overrides = words[words.index(CONFIG) + 1 :]
        world = int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else None
        job = prepare(compose_finetuning(overrides, config=str(ROOT / CONFIG)), world=world)
        assert job.topology.world == 2


def test_the_recipe_runs_as_it_stands(tmp_path: Path) -> None:
    python, *words = commands()[0]
    assert python == "python"
    words = [str(ROOT / CONFIG) if word == CONFIG else word for word in words]
    few = ["train.max_steps=4", "train.validation_every=4", "train.checkpoint_every=2", "watch.every=2"]
    done = subprocess.run(
        [sys.executable, *words, *few, "train.log_every=2", "watch.probe_documents=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "step 4/4  validation loss" in done.stderr
    assert (tmp_path / "out/finetune/checkpoints/step=3-last/weights/metadata.json").is_file()
    for store, steps in (("out/finetune_states", {0, 2}), ("out/finetune_probe", {0, 2, 4})):
        assert {step.step for step in open_store(tmp_path / store).steps} == steps
    assert any((tmp_path / "out/finetune/tensorboard").iterdir())
