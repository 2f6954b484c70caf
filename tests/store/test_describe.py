"""What is in a store; `tests/cli` has the same as people see it."""

import json
from pathlib import Path

import pytest

from nemo_qwen_hidden.store.read.describe import as_dict, hook_point_lines, total_bytes
from nemo_qwen_hidden.store.read.reader import open_store
from tests.store.crafted import PARTS, Crafted, craft


@pytest.fixture(scope="module")
def crafted(tmp_path_factory: pytest.TempPathFactory) -> Crafted:
    return craft(tmp_path_factory.mktemp("described") / "store", parts=PARTS, dtype="bf16")


def test_hook_points_with_norm_and_both_numberings(crafted: Crafted) -> None:
    lines = {line.name: line for line in hook_point_lines(open_store(crafted.path))}
    assert list(lines) == ["embed", "resid_post@0", "resid_post@3", "final_norm"]
    assert [line.huggingface_index for line in lines.values()] == [0, 1, None, 4]
    assert [line.layer for line in lines.values()] == [None, 0, 3, None]
    assert [line.norm for line in lines.values()] == ["before", "before", "before", "after"]
    assert lines["resid_post@3"].shards == 10 and "before the final norm" in lines["resid_post@3"].meaning


def test_values_of_a_hook_point(crafted: Crafted) -> None:
    line = hook_point_lines(open_store(crafted.path))[1]
    states = next(values for point, values in crafted.states.items() if str(point) == line.name).double()
    assert line.max_abs == states.abs().max()
    assert line.min_norm == pytest.approx(float(states.norm(dim=1).min()), rel=1e-12)
    assert line.max_norm == pytest.approx(float(states.norm(dim=1).max()), rel=1e-12)
    assert (line.nan, line.inf, line.error_max) == (0, 0, 0.009)
    assert line.error_rms == pytest.approx((45 / 2**50 / 34) ** 0.5)


def test_for_programs(crafted: Crafted) -> None:
    found = json.loads(json.dumps(as_dict(open_store(crafted.path))))
    assert (found["rows"], found["documents"], found["hidden_size"], found["shards"]) == (34, 9, 6, 10)
    assert found["dtypes"] == {"compute": "fp32", "stored": "bf16"} and found["final_norm"] is True
    assert [part["rows"] for part in found["parts"]] == [23, 0, 4, 7]
    assert found["parts"][3]["shard_rows"] == 2
    assert found["hook_points"][2]["name"] == "resid_post@3" and found["model"] == {"path": "tiny", "num_layers": 4}
    assert found["producers"] == [{"layout": {"tp": 1}, "versions": {"torch": "2.13"}}]


def test_what_loses_nothing_has_no_error(tmp_path: Path) -> None:
    line = hook_point_lines(open_store(craft(tmp_path / "s", parts=(((), 5),)).path))[0]
    assert (line.error_rms, line.error_max, line.max_abs, line.min_norm, line.shards) == (None, None, 0.0, 0.0, 0)


def test_bytes_are_those_on_disk(crafted: Crafted) -> None:
    on_disk = sum(path.stat().st_size for path in crafted.path.rglob("*.*") if path.name != "manifest.json")
    assert total_bytes(open_store(crafted.path)) == on_disk
