"""``extract.begin``: the data are read before anything of an earlier store is touched, and what is there decides."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.config import CaptureSettings, DataSettings, PrecisionSettings, Settings, StoreSettings
from nemo_qwen_hidden.errors import ConfigErrors, DataError, StoreError, UserError
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.store.read.tokens import TokenTable


def settings(folder: Path, **store: Any) -> Settings:
    """The embedded model over ``folder/data.jsonl``, token ids that need no tokenizer."""
    data = DataSettings(path=str(folder / "data.jsonl"), max_tokens=2)
    return Settings(data=data, store=StoreSettings(path=str(folder / "deep" / "store"), **store))


def write(folder: Path, *documents: list[int]) -> None:
    lines = (json.dumps({"token_ids": ids}) + "\n" for ids in documents)
    (folder / "data.jsonl").write_text("".join(lines))


def begun(asked: Settings) -> extract.Begun:
    """Begins, and leaves all undone, as a crash would."""
    job = prepare(asked, world=None, for_store=True)
    with extract.locked(job):
        return extract.begin(job)


def files(job: Job) -> list[tuple[Path, bytes]]:
    """What is in the store, but for locks."""
    return sorted((p, p.read_bytes()) for p in job.store_path.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_begins_with_a_token_table(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3], [], [4])
    found = begun(settings(tmp_path))
    part = found.manifest.parts[0]
    assert (part.rows, part.documents, part.data["documents_cut_into_windows"]) == (4, 3, 1)
    store = tmp_path / "deep" / "store"
    assert TokenTable(store, found.manifest.parts).token_id[:].tolist() == [1, 2, 3, 4]
    assert [path.name for path in store.parent.iterdir()] == ["store"]
    assert (found.work, len(found.missing)) == ("new store", 4)


def test_bad_data_leave_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path, [1], [99_999])
    with pytest.raises(DataError, match="token ids from 0 to 2047"):
        begun(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_bad_data_leave_an_earlier_store_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    begun(settings(tmp_path))
    job = prepare(settings(tmp_path, overwrite=True), world=None, for_store=True)
    before = files(job)
    write(tmp_path, [1], [99_999])
    with pytest.raises(DataError):
        begun(job.settings)
    assert files(job) == before


def test_the_same_job_is_resumed(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    first, second = begun(settings(tmp_path)), begun(settings(tmp_path))
    assert second.work == "resumed"
    assert second.manifest.parts == first.manifest.parts
    assert [producer["work"] for producer in second.manifest.producers] == ["new store", "resumed"]


def test_what_nothing_was_done_of_is_discarded(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    job = prepare(settings(tmp_path), world=None, for_store=True)
    with extract.locked(job):
        extract.begin(job)
        assert extract.discard(job)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"] or not list((tmp_path / "deep").iterdir())


OTHERS: dict[str, tuple[str, Any]] = {
    "precision.compute": ("`precision.compute` must be fp32, as in the unfinished store", "bf16"),
    "precision.stored": ("`precision.stored` must be fp32, as in the unfinished store", "int8"),
    "capture.hook_points": (r"`capture.hook_points` must be \[resid_post@0,.*as in the unfinished", ("embed",)),
    "data.max_tokens": ("`data.max_tokens` must be 2, as in the unfinished store", 1),
    "store.shard_rows": ("`store.shard_rows` must be 65536, as in the unfinished store", 7),
}


@pytest.mark.parametrize("setting", OTHERS)
def test_another_job_is_refused_with_the_difference(setting: str, tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    begun(settings(tmp_path))
    words, value = OTHERS[setting]
    group, name = setting.split(".")
    asked = settings(tmp_path)
    other = replace(asked, **{group: replace(getattr(asked, group), **{name: value})})
    if setting == "precision.compute":
        other = replace(other, precision=replace(other.precision, stored="fp32"))
    before = files(prepare(asked, world=None, for_store=True))
    with pytest.raises(UserError, match=words):
        begun(other)
    assert files(prepare(asked, world=None, for_store=True)) == before


def test_other_documents_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    begun(settings(tmp_path))
    write(tmp_path, [1, 3])
    with pytest.raises(StoreError, match=r"`data.path` must give the documents of sha256 [0-9a-f]{64}, as in"):
        begun(settings(tmp_path))


def test_several_differences_are_named_together(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    begun(settings(tmp_path))
    other = replace(settings(tmp_path), precision=PrecisionSettings(compute="bf16"))
    with pytest.raises(ConfigErrors) as caught:
        begun(replace(other, capture=CaptureSettings(hook_points=("embed",))))
    assert [problem.setting for problem in caught.value.problems] == [
        "precision.compute",
        "precision.stored",
        "capture.hook_points",
    ]


def test_nothing_is_added_to_nothing(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    for add in ("hook_points", "documents"):
        with pytest.raises(StoreError, match=r"`store.path` must be the folder of a store, to which `store.add` adds"):
            begun(settings(tmp_path, add=add))
    assert not (tmp_path / "deep").exists()


def test_overwriting_starts_again(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    begun(settings(tmp_path))
    write(tmp_path, [1, 2, 3])
    again = begun(settings(tmp_path, overwrite=True))
    assert (again.work, again.manifest.rows, len(again.manifest.producers)) == ("new store", 3, 1)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    store = tmp_path / "deep" / "store"
    (store / "tokens").mkdir(parents=True)
    (store / "manifest.json").write_text('{"format": "nemo')
    with pytest.raises(StoreError, match=r"store/manifest.json` must be the manifest of a store; it is damaged, or"):
        begun(settings(tmp_path))
