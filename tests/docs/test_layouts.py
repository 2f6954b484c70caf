"""docs/layouts.md: its commands run, and its settings are those that there are."""

import re
import shlex
from pathlib import Path

import pytest

from nemo_qwen_hidden.cli import known
from nemo_qwen_hidden.cli.main import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "layouts.md").read_text()


def commands() -> list[str]:
    return [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_a_command_runs(command: str) -> None:
    program, *arguments = shlex.split(command, comments=True)
    assert program == "nemo-qwen-hidden" and main(arguments) == 0


def test_every_axis_has_its_line() -> None:
    sizes = [name for name in known.kinds() if re.fullmatch(r"parallel\.(sp|[a-z]p)", name)]
    assert sorted(re.findall(r"^\| `(parallel\.\w+)` \| ", PAGE, re.M)[: len(sizes)]) == sorted(sizes)
