"""What a job makes of a store that is there: shapes, kept rows and pooling go along, and what differs is named."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden import target
from nemo_qwen_hidden.config import CaptureSettings, DataSettings, Settings, StoreSettings, TokenSettings
from nemo_qwen_hidden.errors import StoreError, UserError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.provenance import model_of, norm_file_of
from nemo_qwen_hidden.store.entries import FileEntry, Part
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.write.session import Found

SITES = ("q@1", "k@1", "attn_weights@1", "mlp_act@1", "resid_post@1", "final_norm")
RULE = {"every": 2}


def job_of(
    folder: Path, points: Sequence[str] = SITES, *, heads: Sequence[str] = (), pool: str = "none", **store: Any
) -> Job:
    (folder / "data.jsonl").write_text('{"token_ids": [1, 2, 3, 4, 5]}\n')
    asked = Settings(
        data=DataSettings(path=str(folder / "data.jsonl"), max_tokens=5),
        capture=CaptureSettings(hook_points=tuple(points), heads=tuple(heads)),
        tokens=TokenSettings(pool=pool),
        store=StoreSettings(path=str(folder / "store"), shard_rows=2, **store),
    )
    return prepare(asked, world=None, for_store=True)


def part_of(**changes: Any) -> Part:
    """Five rows, of which three are kept."""
    file, lines = (FileEntry(file=f"tokens/000000.{end}", bytes=1, sha256="0" * 64) for end in ("safetensors", "jsonl"))
    given = {"first_row": 0, "rows": 5, "first_document": 0, "documents": 1, "shard_rows": 2, "kept": 3}
    data = {"sha256": "a", "max_tokens": 5}
    return Part(**(given | {"selection": RULE, "tokens": file, "lines": lines, "data": data} | changes))


def new(job: Job, part: Part | None = None) -> Manifest:
    return target.new(job, part or part_of(), model_of(job), None, norm_file_of(job))


def test_shapes_are_the_models(tmp_path: Path) -> None:
    job = job_of(tmp_path, heads=("3", "1"))
    shape = job.architecture.shape
    made = new(job)
    assert {str(entry.point): entry.shape for entry in made.hook_points} == {
        "q@1": (shape.num_heads, shape.head_dim),
        "k@1": (shape.num_query_groups, shape.head_dim),
        "attn_weights@1": (2, 5),
        "mlp_act@1": (shape.ffn_hidden_size,),
        "resid_post@1": (shape.hidden_size,),
        "final_norm": (shape.hidden_size,),
    }
    assert [entry.heads for entry in made.hook_points] == [None, None, (1, 3), None, None, None]
    assert (made.states, made.grid.shards, made.parts[0].selection, made.version) == (3, 2, RULE, 2)


def test_plain_jobs_make_version_1(tmp_path: Path) -> None:
    assert new(job_of(tmp_path, ["resid_post@1"]), part_of(kept=None, selection=None)).version == 1


@pytest.mark.parametrize(("pooling", "divisor"), [("none", True), ("last", True), ("mean", False)])
def test_a_mean_has_no_divisor(tmp_path: Path, pooling: str, divisor: bool) -> None:
    made = new(job_of(tmp_path, ["resid_post@1", "final_norm"], pool=pooling))
    assert (made.pooling or "none", made.entry(HookPoint("final_norm")).divisor) == (pooling, divisor)


def test_hook_points_are_added_to_the_kept_rows(tmp_path: Path) -> None:
    store = new(job_of(tmp_path, ["resid_post@1"]))
    larger = target.with_hook_points(job_of(tmp_path), store)
    assert larger.parts == store.parts and {len(entry.shards) for entry in larger.hook_points} == {2}


def test_documents_are_added_after_the_kept_rows(tmp_path: Path) -> None:
    store = new(job_of(tmp_path))
    larger = target.with_documents(store, part_of(rows=4, kept=1))
    assert (larger.rows, larger.states, larger.first_states) == (9, 4, (0, 3, 4))
    assert [part.first_row for part in larger.parts] == [0, 5]
    assert [(entry.shards[-1], len(entry.shards)) for entry in larger.hook_points] == [(None, 3)] * 6


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (part_of(selection={"every": 3}), r"`tokens` must be \{'every': 2\}, as .*, but is \{'every': 3\} instead"),
        (part_of(selection=None), r"`tokens` must be \{'every': 2\}, as .*, but is 'some rows' instead"),
        (part_of(kept=None, selection=None), r"`tokens` must be \{'every': 2\}, as .*, but is 'all rows' instead"),
    ],
)
@pytest.mark.parametrize("data", ["a", "b"])
def test_other_rows_are_refused(tmp_path: Path, part: Part, said: str, data: str) -> None:
    job = job_of(tmp_path, add="documents")
    found = Found(finished=new(job), unfinished=None)
    with pytest.raises(StoreError, match=said):
        target.check_data(job, found, replace(part, data={"sha256": data}), None)
    assert target.check_data(job, found, part_of(data={"sha256": "b"}), None) is None
    assert target.check_data(job, found, part_of(), None) == part_of()


def test_the_same_rule_has_to_keep_the_same_rows(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    found = Found(finished=None, unfinished=new(job), begun="begun today")
    other = part_of(tokens=FileEntry(file="tokens/000000.safetensors", bytes=1, sha256="1" * 64))
    with pytest.raises(StoreError, match=r"`tokens` must keep the rows that it kept \(3 of them\), as in the unfin"):
        target.check_data(job, found, other, None)


def test_other_poolings_and_heads_are_refused(tmp_path: Path) -> None:
    asked = job_of(tmp_path, heads=("1", "3"), pool="last")
    found = Found(finished=None, unfinished=new(asked), begun="begun today")
    target.check_settings(asked, found, model_of(asked))
    job = job_of(tmp_path)
    with pytest.raises(UserError) as caught:
        target.check_settings(job, found, model_of(job))
    first, second = str(caught.value).splitlines()
    assert first.startswith("`tokens.pool` must be last, as in the unfinished store at")
    assert second.startswith("`capture.heads` must be [1,3], as in the unfinished store at")
    assert second.endswith("but is 'all' instead.")
