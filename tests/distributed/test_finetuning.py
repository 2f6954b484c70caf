"""Fine-tuning runs: resumption after a kill, in the same and in another layout."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from nemo_qwen_hidden import finetuning
from nemo_qwen_hidden.config import (
    CaptureSettings,
    FinetuneSettings,
    ModelSettings,
    ParallelSettings,
    RunSettings,
    TrainSettings,
    WatchSettings,
)
from nemo_qwen_hidden.conversion import convert
from nemo_qwen_hidden.errors import ConfigError, ConfigErrors, DataError, RankError
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.store.format import MARKER
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.training.job import CHECKPOINTS, FinetuningJob, prepare
from nemo_qwen_hidden.training.started import fit_started
from tests.conftest import Start
from tests.support.models import relative_error

STATES = "states"
TRAIN = TrainSettings(
    max_steps=8,
    lr=1e-3,
    seq_length=32,
    global_batch_size=4,
    validation_part=0.2,
    validation_every=4,
    validation_batches=1,
    checkpoint_every=3,
)


def job_at(folder: Path, **parallel: Any) -> FinetuningJob:
    settings = FinetuneSettings(
        train=TRAIN,
        run=RunSettings(path=str(folder)),
        parallel=ParallelSettings(**parallel),
        capture=CaptureSettings(hook_points=("resid_post@3",)),
        watch=WatchSettings(store=str(folder / STATES), every=2),
    )
    return prepare(settings, world=None)


def fit_until_killed(rank: Rank, job: FinetuningJob, step: int) -> None:
    """Fine-tunes; the last rank is killed after ``step`` steps."""
    import lightning.pytorch as pl

    from nemo_qwen_hidden.training import run

    class Killer(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step and rank.rank == rank.world - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    watchers = run._watchers(job)
    with mock.patch.object(run, "_watchers", lambda job: [*watchers, Killer()]):
        fit_started(rank, job)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state in the last checkpoint of a run, read by torch alone."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    checkpoint = max((run / CHECKPOINTS).glob("*-last"), key=lambda path: path.stat().st_mtime)
    found: dict[str, Any] = {}
    reader = FileSystemReader(checkpoint / "weights")
    _load_state_dict(found, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in _flat(found) if isinstance(value, torch.Tensor)}


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in _flat(value, f"{prefix}/{key}")]
    return [(prefix, tree)]


def test_a_killed_run_goes_on_in_any_layout_to_the_same_weights(tmp_path: Path, start_ranks: Start) -> None:
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    start_ranks(2, fit_started, job_at(whole, tp=2))
    with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
        start_ranks(2, fit_until_killed, job_at(killed, tp=2), 5)
    assert job_at(killed, tp=2).begun
    shutil.copytree(killed, moved)
    start_ranks(2, fit_started, job_at(killed, tp=2))
    start_ranks(2, fit_started, job_at(moved, pp=2))
    expected, same, other = map(tensors_of, (whole, killed, moved))
    assert any("exp_avg" in name for name in expected) and any("linear_qkv" in name for name in expected)
    assert same.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(same[name], tensor), name
        assert torch.allclose(other[name], tensor, rtol=0, atol=1e-4), name
    stores = [open_store(run / STATES) for run in (whole, killed, moved)]
    assert [[step.step for step in store.steps] for store in stores] == [[0, 2, 4, 6]] * 3
    states = [np.asarray(store["resid_post@3"][:], np.float32) for store in stores]
    assert np.array_equal(states[1], states[0])
    assert relative_error(torch.from_numpy(states[2]), torch.from_numpy(states[0])) < 1e-4


def test_a_run_begins_from_the_checkpoint_of_another(tmp_path: Path, start_ranks: Start) -> None:
    def one_step(name: str, model: Path | None) -> FinetuningJob:
        job = job_at(tmp_path / name)
        train = replace(TRAIN, max_steps=1, validation_part=0.0)
        path = None if model is None else str(model)
        return prepare(replace(job.settings, train=train, model=ModelSettings(path=path)), world=None)

    first = one_step("first", None)
    start_ranks(1, fit_started, first)
    checkpoint = next((first.run_path / CHECKPOINTS).glob("*-last"))
    convert(str(checkpoint), str(tmp_path / "huggingface"))
    made = {}
    for name, model in (("nemo", checkpoint), ("converted", tmp_path / "huggingface")):
        start_ranks(1, fit_started, one_step(name, model))
        made[name] = tensors_of(tmp_path / name)
    begun = tensors_of(first.run_path)
    weights = [name for name in begun if "exp_avg" not in name and "linear_fc1.weight" in name]
    assert weights and not any(torch.equal(made["nemo"][name], begun[name]) for name in weights)
    assert made["nemo"].keys() == made["converted"].keys()
    assert all(torch.equal(made["converted"][name], tensor) for name, tensor in made["nemo"].items())


def test_a_run_goes_on_with_its_own_data_alone(tmp_path: Path, start_ranks: Start) -> None:
    job = job_at(tmp_path / "run")
    short = replace(job.settings, train=replace(TRAIN, max_steps=1, validation_part=0.0))
    start_ranks(1, fit_started, replace(job, settings=short))
    start_ranks(1, fit_started, replace(job, settings=short))  # which has come to its end
    assert [path.name for path in job.checkpoints] == ["step=0-last"]
    with pytest.raises(DataError, match=r"must be what the run at .* was begun with"):
        start_ranks(1, fit_started, job)
    longer = replace(job.settings, train=replace(short.train, max_steps=4, lr=2e-3))
    with pytest.raises(ConfigErrors, match=r"(?s)`train\.max_steps` must be 1, as .*`train\.lr` must be 0\.001, as"):
        start_ranks(1, fit_started, replace(job, settings=longer))


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"`run\.path` must be a new folder.*this one holds `notes\.txt`"):
        job_at(tmp_path)


def test_a_start_that_failed_leaves_a_folder_to_start_in(tmp_path: Path) -> None:
    for name in ("nemo_log_globalrank-0_localrank-0.txt", "nemo_error_log.txt", "cmd-args.log", "lightning_logs.txt"):
        (tmp_path / name).touch()
    for name in ("run_0", "tokenizer"):
        (tmp_path / name).mkdir()
    assert not job_at(tmp_path).begun


def test_a_checkpoint_that_a_crash_cut_off_is_none(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / CHECKPOINTS / "step=2-last"
    for path in (checkpoint, checkpoint.with_name("step=5-last")):
        (path / "weights").mkdir(parents=True)
    (mark := checkpoint.with_name("step=5-last-unfinished")).touch()
    job = job_at(tmp_path / "run")
    assert job.begun and job.checkpoints == [checkpoint]
    finetuning.tidy(job)
    assert checkpoint.is_dir() and not mark.exists() and job.unfinished == []
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step=2-last"]


def test_a_run_begins_with_a_store_of_its_own(tmp_path: Path) -> None:
    (store := tmp_path / "store").mkdir()
    (store / MARKER).touch()
    settings = replace(job_at(tmp_path / "run").settings, watch=WatchSettings(store=str(store)))
    with pytest.raises(ConfigError, match=r"`watch\.store` must be a new folder where the run begins"):
        prepare(settings, world=None)


def test_what_cannot_be_trained_is_refused_at_once(tmp_path: Path) -> None:
    settings = FinetuneSettings(run=RunSettings(path=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match=r"`run\.path` must name the folder"):
        prepare(FinetuneSettings(), world=None)
    for train, setting in (
        (TrainSettings(recompute="all"), r"train\.recompute"),
        (TrainSettings(max_steps=0), r"train\.max_steps"),
        (TrainSettings(lr=float("nan")), r"train\.lr"),
        (TrainSettings(validation_part=1.0), r"train\.validation_part"),
        (TrainSettings(seq_length=513), r"train\.seq_length"),
        (TrainSettings(global_batch_size=3, micro_batch_size=2), r"train\.global_batch_size"),
        (TrainSettings(recompute_layers=2), r"train\.recompute_layers"),
        (TrainSettings(recompute="uniform", recompute_layers=4), r"train\.recompute_layers"),
    ):
        with pytest.raises((ConfigError, ConfigErrors), match=f"`{setting}`"):
            prepare(replace(settings, train=train), world=None)
    virtual = replace(settings, parallel=ParallelSettings(pp=2, vp=2), train=TrainSettings(global_batch_size=3))
    with pytest.raises(ConfigError, match="virtual stages take turns"):
        prepare(virtual, world=None)
    store, both = str(tmp_path / "store"), ("train", "validation")
    (file := tmp_path / "file").touch()
    for watch, setting in (
        (WatchSettings(store=store, probe_store=f"{store}/../store"), r"watch\.probe_store"),
        (WatchSettings(probe_data="probes.jsonl"), r"watch\.probe_data"),
        (WatchSettings(probe_documents=3), r"watch\.probe_documents"),
        (WatchSettings(probe_store=store, probe_data=str(tmp_path / "none.jsonl")), r"watch\.probe_data"),
        (WatchSettings(store=store, phases=both, every=30), r"watch\.every"),  # validations at 50 and 100
        (WatchSettings(store=str(file)), r"watch\.store"),
    ):
        with pytest.raises((ConfigError, DataError), match=f"`{setting}`"):
            prepare(replace(settings, watch=watch), world=None)
    unvalidated = replace(
        settings, train=TrainSettings(validation_part=0), watch=WatchSettings(store=store, phases=both)
    )
    with pytest.raises(ConfigError, match=r"`watch\.phases` must leave out validation"):
        prepare(unvalidated, world=None)
    attention = CaptureSettings(hook_points=("attn_weights@0",))
    with pytest.raises(ConfigError, match=r"`capture\.hook_points` must leave out attn_weights"):
        prepare(replace(settings, capture=attention, watch=WatchSettings(store=store)), world=None)
    assert not (tmp_path / "run").exists()
