"""A finished store is left as it is, added to, or repaired by the same command; never run twice."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.config import (
    CaptureSettings,
    DataSettings,
    ModelSettings,
    ParallelSettings,
    PrecisionSettings,
    RuntimeSettings,
    Settings,
    StoreSettings,
)
from nemo_qwen_hidden.errors import UserError
from nemo_qwen_hidden.job import prepare
from nemo_qwen_hidden.store.read.reader import Store, open_store
from tests.conftest import Start
from tests.support.models import TINY, Tiny, write_documents
from tests.support.ranks import stored

POINTS = ("resid_post@0", "resid_post@-1")
FIRST, SECOND = (3, 0, 31, 1, 57), (17, 23, 2, 90, 40)


@pytest.fixture
def settings(tiny_folders: dict[Tiny, Path], tmp_path: Path) -> Settings:
    return Settings(
        model=ModelSettings(path=str(tiny_folders[TINY[1]])),
        capture=CaptureSettings(hook_points=POINTS),
        data=DataSettings(path=str(write_documents(tmp_path / "first.jsonl", FIRST)), max_tokens=50, batch_tokens=100),
        store=StoreSettings(path=str(tmp_path / "store"), shard_rows=33),
        runtime=RuntimeSettings(threads=1),
    )


@pytest.fixture
def run(start_ranks: Start) -> Any:
    """Runs a job to its end; what it did."""

    def run(settings: Settings) -> tuple[extract.Summary, Store]:
        job = prepare(settings, world=None, for_store=True)
        with extract.locked(job):
            begun = extract.begin(job)
            ranks = start_ranks(job.topology.world, stored, job, begun) if begun.work else []
            summary = extract.finish(job, begun, ranks)
        return summary, open_store(job.store_path)

    return run


def shards(store: Store) -> dict[str, bytes]:
    files = sorted(store.path.rglob("*.safetensors"))
    return {str(file.relative_to(store.path)): file.read_bytes() for file in files}


def test_the_same_command_again_does_nothing(settings: Settings, run: Any) -> None:
    _, store = run(settings)
    before = (store.path / "manifest.json").read_bytes()
    summary, store = run(replace(settings, parallel=ParallelSettings(dp=2)))
    assert (summary.work, summary.states) == (None, 0)
    assert (store.path / "manifest.json").read_bytes() == before
    assert not (store.path / "journal").exists()


def test_hook_points_are_added(settings: Settings, run: Any, tmp_path: Path) -> None:
    everything = replace(settings, capture=CaptureSettings(hook_points=("embed", *POINTS, "final_norm")))
    _, whole = run(replace(everything, store=replace(settings.store, path=str(tmp_path / "whole"))))
    _, store = run(settings)
    before = shards(store)
    added = replace(settings, capture=CaptureSettings(hook_points=("embed", "final_norm")))
    added = replace(
        added,
        store=replace(settings.store, add="hook_points"),
        data=DataSettings(path="nowhere", max_tokens=50, batch_tokens=100),
    )
    summary, store = run(added)
    assert (summary.work, store.hook_points) == ("hook points added", whole.hook_points)
    assert before.items() <= shards(store).items()
    assert shards(store) == shards(whole)
    summary, _ = run(added)
    assert summary.work is None


def test_documents_are_added(settings: Settings, run: Any, tmp_path: Path) -> None:
    _, store = run(settings)
    before = shards(store)
    second = replace(settings.data, path=str(write_documents(tmp_path / "second.jsonl", SECOND, seed=9)))
    added = replace(settings, data=second, store=replace(settings.store, add="documents", shard_rows=40))
    summary, store = run(replace(added, parallel=ParallelSettings(tp=2)))
    assert (summary.work, summary.states) == ("documents added", sum(SECOND))
    assert before.items() <= shards(store).items()
    assert (store.rows, store.documents) == (sum(FIRST + SECOND), len(FIRST + SECOND))
    alone = replace(settings, data=second, store=replace(settings.store, path=str(tmp_path / "alone")))
    _, other = run(alone)
    for point in store.hook_points:
        difference = store[point][sum(FIRST) :].double() - other[point][:].double()
        assert difference.norm() <= 5e-6 * other[point][:].double().norm()
    assert store.tokens.token_id[sum(FIRST) :].tolist() == other.tokens.token_id[:].tolist()
    assert len(store.document(len(FIRST))) == SECOND[0]
    summary, _ = run(added)
    assert summary.work is None
    grown = tmp_path / "grown.jsonl"
    grown.write_text((tmp_path / "second.jsonl").read_text() + '{"id": "new", "token_ids": [1]}\n')
    with pytest.raises(UserError, match=r"`data.path` must give no document whose id the store at .* is 'second-0'"):
        run(replace(added, data=replace(second, path=str(grown))))
    assert open_store(store.path).documents == store.documents


def test_hook_points_are_added_to_several_parts(settings: Settings, run: Any, tmp_path: Path) -> None:
    run(settings)
    second = replace(settings.data, path=str(write_documents(tmp_path / "second.jsonl", SECOND, seed=9)))
    run(replace(settings, data=second, store=replace(settings.store, add="documents")))
    added = replace(settings, capture=CaptureSettings(hook_points=("embed",)))
    _, store = run(replace(added, store=replace(settings.store, add="hook_points"), parallel=ParallelSettings(dp=2)))
    tokens = store.tokens.token_id[:].tolist()
    first = {token: row for row, token in reversed(list(enumerate(tokens)))}
    same = [first[token] for token in tokens]
    assert torch.equal(store["embed"][:], store["embed"][same])


def test_another_model_is_refused(settings: Settings, run: Any, tiny_folders: dict[Tiny, Path], tmp_path: Path) -> None:
    run(settings)
    with pytest.raises(UserError, match=r"`model.path` must be|`model.path` must"):
        run(replace(settings, model=ModelSettings(path=str(tiny_folders[TINY[2]]))))
    folder = shutil.copytree(tiny_folders[TINY[1]], tmp_path / "tuned")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # a bit of one value of the last tensor
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"`model.path` must be weights of sha256 [0-9a-f]{64}, as in the store"):
        run(replace(settings, model=ModelSettings(path=str(folder))))


@pytest.mark.parametrize("stored", ["bf16", "fp16", "int8"])
def test_what_storing_costs_stands_in_the_manifest(stored: str, settings: Settings, run: Any, tmp_path: Path) -> None:
    _, exact = run(settings)
    smaller = replace(settings, store=replace(settings.store, path=str(tmp_path / stored)))
    _, store = run(replace(smaller, precision=PrecisionSettings(stored=stored), parallel=ParallelSettings(dp=2)))
    for entry in store.manifest.hook_points:
        truth, kept = exact[entry.point][:].double(), store[entry.point][:].double()
        errors = (kept - truth).norm(dim=1) / truth.norm(dim=1)
        found = [shard.error for shard in entry.present if shard.error is not None]
        total = sum(found[1:], found[0])
        assert total.rows == store.rows
        assert total.max == pytest.approx(float(errors.max()), rel=1e-5)
        assert total.rms == pytest.approx(float((errors**2).mean() ** 0.5), rel=1e-5)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("gather", ["none", "rank0"])
def test_states_before_and_after_the_norm_can_be_had_from_each_other(
    gather: str, layout: dict[str, Any], settings: Settings, run: Any
) -> None:
    both = CaptureSettings(hook_points=("resid_post@-1", "final_norm"), gather=gather)
    _, store = run(replace(settings, capture=both, parallel=ParallelSettings(**layout)))
    before, after = (store[point] for point in store.hook_points)
    for found, truth in ((before.normed(), after), (after.unnormed(), before)):
        assert found.norm == truth.norm
        difference = (found[:].double() - truth[:].double()).norm(dim=1)
        assert (difference / truth[:].double().norm(dim=1)).max() < 1e-6
    some = [5, 0, 91, 5]
    assert torch.equal(after.unnormed()[some], after.unnormed()[:][some])
    assert torch.equal(after.unnormed()[7], after.unnormed()[:][7])
