"""What is in a store, for people and for programs."""

import json

from nemo_qwen_hidden.store.describe import as_dict, describe, hook_point_lines, total_bytes
from nemo_qwen_hidden.store.reader import open_store
from tests.store.helpers import Made


def test_for_people(shared: Made) -> None:
    facts = dict(describe(open_store(shared.path)))
    assert facts["rows"] == "23" and facts["documents"] == "5" and facts["hidden size"] == "6"
    assert facts["dtype"] == "fp32 stored, fp32 computed"
    assert facts["shards"] == "5 a hook point, 5 rows each"
    assert facts["size"].endswith(" kB")
    assert facts["model.path"] == "tiny"
    assert facts["producer.layout"] == "tp=1 pp=1 dp=1 sp=false" and facts["producer.versions.torch"] == "2.13"


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
