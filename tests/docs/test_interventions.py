"""docs/interventions.md: its commands and blocks run, one after the other."""

import os
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from nemo_qwen_hidden.capture import edits
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.hookpoint import RESIDUAL_SITES, SPLIT_SITES
from nemo_qwen_hidden.parallel.launch import Rank
from tests.conftest import Start

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


def test_every_edit_and_site_is_on_the_page() -> None:
    page = PAGE.read_text()
    made = {
        name for name, value in vars(edits).items() if getattr(value, "__annotations__", {}).get("return") is edits.Edit
    }
    assert {name for name in made if not name.startswith("_")} == set(re.findall(r"^\| `(\w+)\(", page, re.M))
    sites = set(re.findall(r"`(\w+?)(?:@[\w+]+)?`", page))
    assert sites >= {*RESIDUAL_SITES, *SPLIT_SITES}
