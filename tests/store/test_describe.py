"""What is in a store; `tests/cli` has the same as people see it."""

import json

from nemo_qwen_hidden.store.describe import as_dict, hook_point_lines, total_bytes
from nemo_qwen_hidden.store.reader import open_store
from tests.store.helpers import Made


def test_hook_points_with_norm_and_both_numberings(shared: Made) -> None:
    lines = {line.name: line for line in hook_point_lines(open_store(shared.path))}
    assert list(lines) == ["embed", "resid_post@0", "resid_post@3", "final_norm"]
    assert [line.huggingface_index for line in lines.values()] == [0, 1, None, 4]
    assert [line.layer for line in lines.values()] == [None, 0, 3, None]
    assert [line.norm for line in lines.values()] == ["before", "before", "before", "after"]
    assert lines["resid_post@3"].shards == 5 and "before the final norm" in lines["resid_post@3"].meaning


def test_for_programs(shared: Made) -> None:
    found = json.loads(json.dumps(as_dict(open_store(shared.path))))
    assert (found["rows"], found["documents"], found["hidden_size"], found["shards"]) == (23, 5, 6, 5)
    assert found["dtypes"] == {"compute": "fp32", "stored": "fp32"}
    assert found["hook_points"][2]["name"] == "resid_post@3" and found["model"] == {"path": "tiny", "num_layers": 4}


def test_bytes_are_those_on_disk(shared: Made) -> None:
    on_disk = sum(path.stat().st_size for path in shared.path.glob("*/*"))
    assert total_bytes(open_store(shared.path)) == on_disk == as_dict(open_store(shared.path))["bytes"]
