"""The recipe that trains a classifier on half of a model, with and without the states of the whole of it."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from nemo_qwen_hidden.store.read.reader import open_store
from tests.recipes.commands import RECIPES, ROOT, shown_in


def test_the_recipe_runs_as_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    readme = RECIPES / "classifier_distillation" / "README.md"
    (shown,) = shown_in(readme)
    assert shown.words == ("python", "recipes/classifier_distillation/classify.py")
    assert (ROOT / shown.words[1]).is_file()
    recipe = import_module("recipes.classifier_distillation.classify")
    found = recipe.compare(tmp_path, steps=2)

    said = [re.sub(r"[\d.]+", "N", line) for line in capfd.readouterr().out.splitlines()]
    scores = "accuracy N, loss N"
    assert said[-3].startswith("N held-out snippets; always ")
    assert said[-2:] == [f"classifier: {scores}", f"with distillation: {scores}"]
    assert all(0 <= each["val_class_accuracy"] <= 1 for each in found.values())
    assert "layer0" not in found["classifier"]
    assert all(0 < found["with distillation"][f"layer{layer}"] < 2 for layer in range(recipe.LAYERS))
    assert found["classifier"]["val_class"] != found["with distillation"]["val_class"]


def test_rows_of_the_teacher_are_those_of_the_tokens(tmp_path: Path) -> None:
    from tests.store.helpers import make_store

    recipe = import_module("recipes.classifier_distillation.classify")
    data, held_out = recipe.snippets(tmp_path)
    assert not set(data.read_text().splitlines()) & set(held_out.read_text().splitlines())
    (tmp_path / "few.jsonl").write_text("\n".join(data.read_text().splitlines()[:3]) + "\n")
    lengths = tuple(int(each) for each in recipe.columns(tmp_path / "few.jsonl", None)["last"] + 1)
    store = make_store(tmp_path / "store", lengths=lengths).path
    columns = recipe.columns(tmp_path / "few.jsonl", store)
    kept = columns["teacher_rows"] >= 0
    assert torch.equal(columns["teacher_rows"][kept], torch.arange(open_store(store).rows))
    assert kept.sum(dim=1).tolist() == list(lengths)
