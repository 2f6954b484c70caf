"""docs/profiling.md: its command and its block run, and it names the columns and the spans that there are."""

import json
import re
import shlex
from pathlib import Path

import pytest

from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.trace.shares import KINDS, NAMES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "profiling.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)
    return str(found)


def spans_of_the_page() -> set[str]:
    cells = re.findall(r"^\|[^|]*\| ((?:`[a-z ]+`(?:, )?)+) \|[^|]*\|[^|]*\|$", PAGE, re.M)
    return {name for cell in cells for name in re.findall(r"`([a-z ]+)`", cell)}


@pytest.mark.distributed
def test_the_command_and_the_block_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(block("bash"))
    assert program == "nemo-qwen-hidden" and main([*arguments, "runtime.threads=1"]) == 0
    said = capfd.readouterr().out
    (header,) = (line for line in said.splitlines() if line.startswith("rank  "))
    assert header.split() == ["rank", "time", *NAMES]
    assert all(len(line) <= 80 for line in said.splitlines())
    exec(block("python"))
    lines = capfd.readouterr().out.splitlines()
    assert [line.rpartition(" pp=")[0] for line in lines] == ["rank 0:", "rank 1:"]
    events = json.loads((tmp_path / "out/trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} <= spans_of_the_page()


def test_columns_and_spans_are_on_the_page() -> None:
    columns = re.findall(r"^\| `(\w+)` \| [^|]*\|$", PAGE, re.M)
    assert columns == list(NAMES)
    assert set(KINDS) <= spans_of_the_page()
