"""What ``prepare`` decides, and what it refuses; the sentences are in tests/cli/test_bad_input.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.config import (
    CaptureSettings,
    DataSettings,
    ParallelSettings,
    PrecisionSettings,
    Settings,
    StoreSettings,
)
from nemo_qwen_hidden.errors import ConfigError, ConfigErrors
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.topology import Topology

# The embedded model: 6 layers, 4 query groups, 512 positions, 2048 tokens of 128 values.


def prepared(world: int | None = None, *, for_store: bool = False, **groups: Any) -> Job:
    return prepare(Settings(**groups), world=world, for_store=for_store)


def test_the_defaults_are_the_embedded_model_and_text() -> None:
    job = prepared()
    assert (job.model_folder, job.data_path) == (demo.model_folder(), str(demo.text_path()))
    assert job.points == tuple(HookPoint("resid_post", layer) for layer in range(6))
    assert (job.num_layers, job.stages, job.final_norm) == (6, (range(6),), False)
    assert (job.batching.max_tokens, job.batching.multiple_of) == (512, 1)
    assert job.topology == Topology()


def test_only_what_the_deepest_hook_point_needs_is_built() -> None:
    job = prepared(
        capture=CaptureSettings(hook_points=("resid_post@2", "embed")), parallel=ParallelSettings(pp=2, tp=2, sp=True)
    )
    assert (job.num_layers, job.stages) == (3, (range(2), range(2, 3)))
    assert job.points_of(0) == (HookPoint("embed"),)
    assert job.points_of(1) == (HookPoint("resid_post", 2),)
    assert job.batching.multiple_of == 2


def test_embeddings_alone_still_make_one_layer() -> None:
    """A Megatron decoder has at least one; it is not run."""
    assert prepared(capture=CaptureSettings(hook_points=("embed",))).num_layers == 1


def test_the_final_norm_is_kept_where_it_is_asked_for() -> None:
    job = prepared(capture=CaptureSettings(hook_points=("final_norm",)), parallel=ParallelSettings(pp=2))
    assert (job.final_norm, job.num_layers) == (True, 6)
    assert job.points_of(1) == (HookPoint("final_norm"),)


@pytest.mark.parametrize(("world", "dp", "expected"), [(None, None, 1), (None, 2, 2), (4, None, 2), (4, 2, 2)])
def test_replicas_fill_the_ranks_there_are(world: int | None, dp: int | None, expected: int) -> None:
    assert prepared(world, parallel=ParallelSettings(tp=2, dp=dp)).topology == Topology(tp=2, dp=expected)


def test_bytes_of_a_rank() -> None:
    """One stage of one rank holds every parameter but the output layer; two dtypes."""
    whole = prepared().rank_bytes(0).weights
    half = prepared(precision=PrecisionSettings(compute="bf16")).rank_bytes(0).weights
    layer = 128 * (128 + 2 * 64) + (128 + 2 * 64) + 128 * 128 + 3 * 128 * 384 + 2 * 128
    assert whole == 4 * (2048 * 128 + 6 * layer) == 2 * half
    stages = prepared(parallel=ParallelSettings(pp=2))
    assert stages.rank_bytes(0).weights + stages.rank_bytes(1).weights == whole


def test_problems_of_several_settings_come_together_each_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        prepared(parallel=ParallelSettings(tp=3, pp=7), data=DataSettings(max_tokens=513))
    assert [problem.setting for problem in caught.value.problems] == ["parallel.tp", "data.max_tokens", "parallel.pp"]


def test_a_home_folder_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.jsonl").write_text(json.dumps({"token_ids": [1]}))
    job = prepared(for_store=True, data=DataSettings(path="~/data.jsonl"), store=StoreSettings(path="~/out/store"))
    assert job.data_path == str(tmp_path / "data.jsonl")
    assert job.store_path == tmp_path / "out" / "store"
    assert job.log_path == tmp_path / "out" / "store.log"


@pytest.mark.parametrize(("store", "log"), [(".", "../here.log"), ("out/", "out.log"), ("../x", "../x.log")])
def test_the_log_lies_beside_the_store(store: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    job = prepared(for_store=True, store=StoreSettings(path=store))
    assert job.log_path == (tmp_path / "here" / log).resolve()


def test_a_store_path_is_needed_for_a_store_alone() -> None:
    prepared()
    with pytest.raises(ConfigError, match=r"`store.path` must name the folder"):
        prepared(for_store=True)


APART = {
    "beside": ("corpus", "out"),
    "hidden": ("corpus", "corpus/.out/store"),
    "other-names": ("corpus/*.txt", "corpus/out"),
    "shallow-glob": ("corpus/deep/*", "corpus/out"),
    "one-file": ("corpus/a.txt", "corpus/out"),
}


@pytest.mark.parametrize(("data", "store"), APART.values(), ids=APART)
def test_a_store_near_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, store: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt"):
        (tmp_path / "corpus" / name).write_text("text")
    prepared(for_store=True, data=DataSettings(path=data), store=StoreSettings(path=store))


AMONG = {
    "folder": ("corpus", "corpus/out"),
    "here": (".", "out"),
    "glob": ("corpus/*", "corpus/out"),  # would read out.log
    "deep-glob": ("**/*", "out"),
    "absolute": ("{root}/corpus", "corpus/deep/out"),
}


@pytest.mark.parametrize(("data", "store"), AMONG.values(), ids=AMONG)
def test_a_store_among_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, store: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"`store.path` must lie where `data.path`"):
        prepared(
            for_store=True,
            data=DataSettings(path=data.format(root=tmp_path)),
            store=StoreSettings(path=store),
        )
