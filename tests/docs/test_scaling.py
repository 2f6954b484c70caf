"""docs/scaling.md: its commands run, and its tables are what the code gives."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.scaling_table import paces, planned, totals
from nemo_qwen_hidden.cli.main import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()


def commands() -> list[str]:
    return [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_a_command_runs(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    assert program == "nemo-qwen-hidden" and main(arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any(line.startswith("binds ") for line in lines)


def test_the_tables_are_what_the_code_gives() -> None:
    for table in (paces(), totals()):
        assert "\n" + "\n".join(table) + "\n" in PAGE


def test_time_bytes_and_cost_grow_with_the_tokens() -> None:
    for model in ("7B", "72B"):
        (_, small), (_, large) = (planned(model, 64, "all", tokens) for tokens in (10**9, 10**12))
        assert large.secs == pytest.approx(1000 * small.secs)
        assert large.stored_bytes == 1000 * small.stored_bytes
        assert large.binds.name == small.binds.name
