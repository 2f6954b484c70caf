"""``extract.begin``: the data are read before anything of an earlier store is touched."""

import json
from pathlib import Path

import pytest

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.config import DataSettings, Settings, StoreSettings
from nemo_qwen_hidden.errors import DataError
from nemo_qwen_hidden.job import prepare
from nemo_qwen_hidden.store.session import discard
from nemo_qwen_hidden.store.tokens import TokenTable


def settings(folder: Path, *, overwrite: bool = False) -> Settings:
    """The embedded model over ``folder/data.jsonl``, token ids that need no tokenizer."""
    data = DataSettings(path=str(folder / "data.jsonl"), max_tokens=2)
    return Settings(data=data, store=StoreSettings(path=str(folder / "deep" / "store"), overwrite=overwrite))


def write(folder: Path, *documents: list[int]) -> None:
    lines = (json.dumps({"token_ids": ids}) + "\n" for ids in documents)
    (folder / "data.jsonl").write_text("".join(lines))


def test_begins_with_a_token_table(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3], [], [4])
    job = prepare(settings(tmp_path), world=None, for_store=True)
    begun = extract.begin(job)
    assert (begun.tokens.rows, begun.tokens.documents, begun.windowed) == (4, 3, 1)
    assert TokenTable(job.store_path, begun.tokens).token_id.tolist() == [1, 2, 3, 4]
    assert sorted(path.name for path in job.store_path.parent.iterdir()) == ["store"]


def test_bad_data_leave_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path, [1], [99_999])
    with pytest.raises(DataError, match="token ids from 0 to 2047"):
        extract.begin(prepare(settings(tmp_path), world=None, for_store=True))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_bad_data_leave_an_earlier_store_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    job = prepare(settings(tmp_path), world=None, for_store=True)
    extract.begin(job)
    before = sorted((path, path.read_bytes()) for path in job.store_path.rglob("*") if path.is_file())
    write(tmp_path, [1], [99_999])
    again = prepare(settings(tmp_path, overwrite=True), world=None, for_store=True)
    with pytest.raises(DataError):
        extract.begin(again)
    assert sorted((path, path.read_bytes()) for path in job.store_path.rglob("*") if path.is_file()) == before
    discard(job.store_path)
