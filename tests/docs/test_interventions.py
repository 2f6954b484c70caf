"""docs/interventions.md: its commands and blocks run, one after the other, and what it says is refused, is."""

import os
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_qwen_hidden.capture import edits
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import RESIDUAL_SITES, SPLIT_SITES
from nemo_qwen_hidden.parallel.launch import Rank
from tests.conftest import Start
from tests.support.models import TINY, Tiny

PAGE = Path(__file__).resolve().parents[2] / "docs" / "interventions.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def run_blocks(rank: Rank, folder: Path) -> dict[str, object]:
    """Runs every Python block in one namespace, as a reader would; what was generated without and with an edit."""
    torch.set_num_threads(1)
    os.chdir(folder)
    script = folder / "blocks.py"
    script.write_text("\n".join(blocks("python")))
    made = runpy.run_path(str(script))
    return {name: made[name] for name in ("before", "after")}


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_ranks: Start) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = blocks("bash")
    program, *arguments = shlex.split(command)
    assert program == "nemo-qwen-hidden" and main(arguments) == 0
    (made,) = start_ranks(1, run_blocks, tmp_path)
    assert made["before"] != made["after"]


def refusals(rank: Rank, folder: Path) -> list[str]:
    """What is said of each case of the page's last list that a call can meet."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel

    torch.set_num_threads(1)
    whole = Qwen2HiddenModel.from_pretrained(folder, output_layer=True)
    headless = Qwen2HiddenModel.from_pretrained(folder)
    hidden = whole.config.hidden_size
    ids, states, vector = torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, 5, hidden), torch.zeros(hidden)
    added = edits.add("resid_post@1", vector)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits.sum()

    calls: list[Callable[[], object]] = [
        lambda: edits.zero("q@0"),
        lambda: whole.gradients(ids, hook_points="z@0", metric=metric),
        lambda: edits.zero("embed", mask=torch.ones(2, 5)),
        lambda: whole.logits(ids, edits=[edits.zero("embed", mask=torch.ones(2, 6, dtype=torch.bool))]),
        lambda: whole.logits(ids, edits=[edits.zero("embed", mask=torch.ones(3, 5, dtype=torch.bool))]),
        lambda: whole.logits(ids, edits=[edits.add("embed", vector[:-1])]),
        lambda: whole.logits(ids, edits=[edits.apply("embed", lambda rows, _: rows[:1])]),
        lambda: whole.hidden_states(ids, hook_points="resid_post@0", edits=[added]),
        lambda: whole.logits(ids, edits=[edits.zero("resid_post@9")]),
        lambda: whole.run(states, start=0, stop=1, edits=[added]),
        lambda: headless.logits(ids),
        lambda: headless.generate(ids, tokens=1),
        lambda: headless.gradients(ids, metric=metric),
        lambda: whole.gradients(ids, metric=metric, seeds={"final_norm": states}),
        lambda: whole.gradients(ids),
    ]
    said = []
    for call in calls:
        try:
            call()
        except ConfigError as error:
            said.append(str(error))
        else:
            said.append("not refused")
    return said


def test_what_is_refused(tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    rules = [
        "one of the residual sites",
        "at the residual sites",
        "must be bool",
        "must be of shape [batch, tokens], [2, 5]",
        "must be of shape [batch, tokens], [2, 5]",
        "hidden size 64",
        "shape that it got, [10, 64]",
        "behind the deepest state",
        "must name a layer from 0 to 2",
        "within layers 0 to 0",
        *["must have its output layer"] * 3,
        *["must be one of the two"] * 2,
    ]
    (said,) = start_ranks(1, refusals, tiny_folders[TINY[1]])
    assert [rule for rule, text in zip(rules, said, strict=True) if rule not in text] == []


def test_every_edit_and_site_is_on_the_page() -> None:
    page = PAGE.read_text()
    made = {
        name for name, value in vars(edits).items() if getattr(value, "__annotations__", {}).get("return") is edits.Edit
    }
    assert {name for name in made if not name.startswith("_")} == set(re.findall(r"^\| `(\w+)\(", page, re.M))
    sites = set(re.findall(r"`(\w+?)(?:@[\w+]+)?`", page))
    assert sites >= {*RESIDUAL_SITES, *SPLIT_SITES}
