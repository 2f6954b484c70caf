"""``parallel=auto`` at the command line: what ``plan`` shows, what ``extract`` says and does."""

from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden import job, open_store
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.config import Settings
from nemo_qwen_hidden.plan.cost import Machine, Speeds
from tests.support.models import TINY, write_documents

TOO_LITTLE = (
    "nemo-qwen-hidden: `parallel.memory_gb` must be at least 0.000649 for this model on up to 2 ranks: 0.000549 GB a "
    "rank are missing in the nearest layout, tp=2 pp=1 dp=1 sp=false, where weights take 0.0003 GB, the program 0 GB, "
    "and what grows with `data.max_tokens` and `data.batch_tokens` 0.0003 GB, but is 0.0001 instead.\n"
)
PLANNED = """
why this layout
ranks   2 of up to 2 here, 0.0009 GB each, of which 90% may be filled
memory  0.0006 GB: weights 0.0003, activations 0.0003, states 5e-05, program 0
tp=2    divides each layer, for two all-reduces a layer
its neighbours
instead                       a rank    time    why not
tp=1 pp=1 dp=1 sp=false       969.5 kB  x 0.24  0.00016 GB too much
tp=1 pp=2 dp=1 sp=false       952.1 kB  x 0.16  0.000143 GB too much
tp=1 pp=1 cp=2 dp=1 sp=false  1.0 MB    x 0.93  0.000209 GB too much
tp=1 pp=1 dp=2 sp=false       969.5 kB  x 0.12  0.00016 GB too much
tp=2 pp=1 dp=1 sp=true        616.7 kB  x 1.78  slower
"""
SAID = """
layout tp=2 pp=1 dp=1 sp=false, by parallel.auto; plan shows its neighbours
  ranks: 2 of up to 2 here, 0.0009 GB each, of which 90% may be filled
  memory: 0.0006 GB: weights 0.0003, activations 0.0003, states 5e-05, program 0
  tp=2: divides each layer, for two all-reduces a layer
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def arguments(tiny_folders: dict[Any, Path], tmp_path: Path) -> list[str]:
    """3 layers of 64 values, 2 query groups: 0.5 MB of weights and as much of activations."""
    data = write_documents(tmp_path / "data.jsonl", (40, 1, 128))
    return [f"model.path={tiny_folders[TINY[1]]}", f"data.path={data}", "data.batch_tokens=128", "parallel=auto"]


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of 0.9 MB each, or of ``parallel.memory_gb``."""
    speeds = Speeds(flops=9e10, memory=1.5e10, near=1e9, far=1e9, latency=3e-4)

    def found(settings: Settings, *, world: int | None) -> Machine:
        return Machine(
            world=world,
            per_machine=2,
            memory_bytes=int(1e9 * (settings.parallel.memory_gb or 0.0009)),
            base_bytes=0,
            speeds=speeds,
        )

    monkeypatch.setattr(job, "find_machine", found)


def test_plan_says_why_and_why_not(
    arguments: list[str], small_machine: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 0
    lines = [line.rstrip() for line in capfd.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "layout       tp=2 pp=1 dp=1 sp=false: 2 ranks" in lines
    assert PLANNED.strip() in "\n".join(lines)


@pytest.mark.distributed
def test_extract_says_why_and_runs_in_that_layout(
    arguments: list[str], small_machine: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert main(["extract", f"store.path={store}", "runtime.threads=1", *arguments]) == 0
    out, err = capfd.readouterr()
    assert err.startswith(SAID.lstrip())
    assert max(map(len, SAID.splitlines())) <= 80
    assert "layout       tp=2 pp=1 dp=1 sp=false" in [line.rstrip() for line in out.splitlines()]
    assert open_store(store).rows == 169


def test_too_little_memory_is_refused_with_what_is_missing(
    arguments: list[str], small_machine: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "parallel.memory_gb=0.0001", *arguments]) == 2
    assert capfd.readouterr() == ("", TOO_LITTLE)
