"""Chosen tokens in stores: the same as chosen afterwards from the full store, for every layout, and fewer bytes."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.errors import UserError
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.plan.outliers import NormOutliers
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.upkeep.verify import verify
from tests.conftest import Start
from tests.support.models import TINY, Tiny
from tests.support.ranks import all_stored, stored

TIED = TINY[1]
POINTS = "capture.hook_points=[embed,resid_mid@1,k@0,mlp_act@1,resid_post@2,final_norm]"
LENGTHS = (17, 40, 1, 29, 6, 33)
LAYOUTS = [
    [],
    ["parallel.tp=2", "parallel.sp=true"],
    ["parallel.cp=2"],
    ["parallel.pp=2", "capture.gather=rank0"],
    ["parallel.tp=2", "data.packing=false"],
]
# name: settings, and from a document's length (and its mask) to the positions that are kept
CHOICES: dict[str, tuple[list[str], Any]] = {
    "last": (["tokens.keep=last"], lambda n, mask: [n - 1]),
    "every third": (["tokens.every=3"], lambda n, mask: range(0, n, 3)),
    "spans": (["tokens.keep=spans", "tokens.spans=['1:3','-2:']"], lambda n, mask: {*range(n)[1:3], *range(n)[-2:]}),
    "mask": (["tokens.keep=mask", "tokens.mask_field=chosen"], lambda n, mask: np.flatnonzero(mask)),
    "not the first": (["tokens.first=false"], lambda n, mask: range(1, n)),
}


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    lines = [
        {"id": f"d{number}", "token_ids": generator.integers(0, 380, n).tolist(), "chosen": masks(n)}
        for number, n in enumerate(LENGTHS)
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def masks(length: int) -> list[int]:
    return [int(position % 4 == 1 or position == 0) for position in range(length)]


def job_of(folder: Path, documents: Path, store: Path, *settings: str) -> Job:
    texts = [f"model.path={folder}", f"data.path={documents}", f"store.path={store}", POINTS, "data.batch_tokens=64"]
    return prepare(compose([*texts, "store.shard_rows=13", "runtime.threads=1", *settings]), world=None, for_store=True)


def run(start_ranks: Start, job: Job, norms: Job | None = None) -> None:
    with extract.locked(job):
        begun = extract.begin(job, norms=norms)
        results = start_ranks(job.topology.world, stored, job, begun) if begun.work else []
        extract.finish(job, begun, results)


def run_all(start_ranks: Start, jobs: list[Job]) -> None:
    """Several jobs in the same layout, one after the other on the same ranks."""
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(extract.locked(job))
        work = [(job, extract.begin(job)) for job in jobs]
        ranks = start_ranks(jobs[0].topology.world, all_stored, work)
        for number, (job, begun) in enumerate(work):
            extract.finish(job, begun, [results[number] for results in ranks])


def read(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every hook point's states, and the row of each."""
    store = open_store(path)
    assert verify(path, full=True).findings == ()
    return {str(p): np.asarray(store[str(p)][:]) for p in store.hook_points}, store.row_of_states(slice(None))


@pytest.fixture
def full(start_ranks: Start, tiny_folders: dict[Tiny, Path], documents: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    run(start_ranks, job_of(tiny_folders[TIED], documents, tmp_path / "full"))
    return read(tmp_path / "full")[0]


def rows_of(positions: Any) -> np.ndarray:
    starts = np.cumsum([0, *LENGTHS[:-1]])
    chosen = [start + np.array(sorted(positions(n, masks(n))), int) for start, n in zip(starts, LENGTHS, strict=True)]
    return np.concatenate(chosen)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(layout) or "one rank")
def test_chosen_states_are_those_of_the_full_store(
    start_ranks: Start,
    tiny_folders: dict[Tiny, Path],
    documents: Path,
    tmp_path: Path,
    layout: list[str],
) -> None:
    paths = {name: tmp_path / name.replace(" ", "_") for name in CHOICES}
    jobs = [job_of(tiny_folders[TIED], documents, path, *CHOICES[name][0], *layout) for name, path in paths.items()]
    run_all(start_ranks, [job_of(tiny_folders[TIED], documents, tmp_path / "layout", *layout), *jobs])
    whole, _ = read(tmp_path / "layout")
    for name, (_, positions) in CHOICES.items():
        path = paths[name]
        states, rows = read(path)
        np.testing.assert_array_equal(rows, rows_of(positions), err_msg=name)
        for point, values in states.items():
            np.testing.assert_array_equal(values, whole[point][rows], err_msg=f"{name}: {point}")
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["parts"][0]["selection"], name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(layout) or "one rank")
def test_one_state_for_each_document(
    start_ranks: Start,
    tiny_folders: dict[Tiny, Path],
    documents: Path,
    tmp_path: Path,
    full: dict[str, np.ndarray],
    layout: list[str],
) -> None:
    pools, settings = ("mean", "weighted_mean", "last"), ["tokens.first=false", *layout]
    run_all(
        start_ranks,
        [job_of(tiny_folders[TIED], documents, tmp_path / pool, f"tokens.pool={pool}", *settings) for pool in pools],
    )
    for pool in pools:
        _check_pooled(tmp_path / pool, full, pool)


def _check_pooled(path: Path, full: dict[str, np.ndarray], pool: str) -> None:
    states, rows = read(path)
    ends = np.cumsum(LENGTHS)
    longer = [(end - n, n) for end, n in zip(ends, LENGTHS, strict=True) if n > 1]  # the first tokens are not kept
    np.testing.assert_array_equal(rows, [start + n - 1 for start, n in longer])
    for point, values in states.items():
        for value, (start, n) in zip(values, longer, strict=True):
            kept = full[point][start + 1 : start + n].astype(np.float64)
            weights = {"mean": np.ones(n - 1), "weighted_mean": np.arange(2, n + 1), "last": np.eye(n - 1)[-1]}[pool]
            expected = weights @ kept / weights.sum()
            error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
            assert error < 1e-5, (point, error)


def test_samples_are_the_same_in_every_layout_and_of_the_size_asked_for(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], documents: Path, tmp_path: Path, full: dict[str, np.ndarray]
) -> None:
    found = []
    for number, layout in enumerate(LAYOUTS[:3]):
        settings = ["tokens.sample=20", "tokens.sample_of=all", "tokens.seed=5", "tokens.first=false", *layout]
        run(start_ranks, job_of(tiny_folders[TIED], documents, tmp_path / str(number), *settings))
        states, rows = read(tmp_path / str(number))
        found.append(rows.tolist())
        if not layout:
            assert all(np.array_equal(values, full[point][rows]) for point, values in states.items())
    assert len(found[0]) == 20
    assert found[0] == found[1] == found[2]


def test_rows_above_a_multiple_of_the_median_are_left_out(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], documents: Path, tmp_path: Path, full: dict[str, np.ndarray]
) -> None:
    settings = ["tokens.max_norm=1.1", "tokens.max_norm_at=resid_post@2", "tokens.every=2"]
    job = job_of(tiny_folders[TIED], documents, tmp_path / "calm", *settings)
    norms = extract.norm_job(job)
    assert norms is not None
    run(start_ranks, norms)
    run(start_ranks, job, norms)
    extract.drop_norms(job)
    states, rows = read(tmp_path / "calm")
    may = rows_of(lambda n, mask: range(0, n, 2))
    marked = NormOutliers(1.1).mark(np.linalg.norm(full["resid_post@2"][may], axis=1).astype(np.float32))
    assert 0 < marked.sum() < len(may)
    np.testing.assert_array_equal(rows, may[~marked])
    assert all(np.array_equal(values, full[point][rows]) for point, values in states.items())
    assert not norms.store_path.exists()
    assert extract.norm_job(job) is None  # the rows are known
    run(start_ranks, job)  # and there is nothing left to do


def test_a_store_of_chosen_rows_goes_on_and_gets_hook_points(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], documents: Path, tmp_path: Path, full: dict[str, np.ndarray]
) -> None:
    settings = ["tokens.every=3", "store.shard_rows=5"]
    path = tmp_path / "grown"
    first = replace(job_of(tiny_folders[TIED], documents, path, *settings))
    few = replace(first, points=first.points[:2])
    run(start_ranks, few)
    more = job_of(tiny_folders[TIED], documents, path, *settings, "store.add=hook_points", "parallel.cp=2")
    run(start_ranks, more)
    states, rows = read(path)
    assert len(states) == 6
    for point, values in states.items():
        np.testing.assert_allclose(values, full[point][rows], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="every"):
        run(start_ranks, job_of(tiny_folders[TIED], documents, path, "tokens.every=2", "store.shard_rows=5"))


def test_means_over_windows_are_refused(tiny_folders: dict[Tiny, Path], documents: Path, tmp_path: Path) -> None:
    job = job_of(tiny_folders[TIED], documents, tmp_path / "cut", "tokens.pool=mean", "data.max_tokens=32")
    with extract.locked(job), pytest.raises(UserError, match="2 documents are longer than the 32 tokens"):
        extract.begin(job)


def test_attention_weights_are_stored_for_the_asked_heads_and_refused_above_a_size(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], documents: Path, tmp_path: Path
) -> None:
    asked = ["capture.hook_points=[attn_weights@1]", "capture.heads=[1,3]", "tokens.keep=last", "data.max_tokens=48"]
    run(start_ranks, job_of(tiny_folders[TIED], documents, tmp_path / "one", *asked))
    run(start_ranks, job_of(tiny_folders[TIED], documents, tmp_path / "two", *asked, "parallel.tp=2", "parallel.cp=2"))
    view = open_store(tmp_path / "one")["attn_weights@1"]
    assert (view.shape, view.state_shape, tuple(view.heads or ())) == ((len(LENGTHS), 96), (2, 48), (1, 3))
    weights = np.asarray(view[:]).reshape(-1, 2, 48)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert all(not weights[number, :, n:].any() for number, n in enumerate(LENGTHS))
    np.testing.assert_allclose(np.asarray(open_store(tmp_path / "two")["attn_weights@1"][:]), view[:], atol=1e-5)
    job = job_of(tiny_folders[TIED], documents, tmp_path / "large", *asked, "capture.most_attention_gb=0.000001")
    with extract.locked(job), pytest.raises(UserError, match="most_attention_gb"):
        extract.begin(job)
