"""Fine-tuning runs: resumption after a kill, in the same and in another layout."""

import os
import re
import shutil
import signal
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_qwen_hidden import finetuning
from nemo_qwen_hidden.checkpoint.adapter import Adapter
from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.cli.main import main
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
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks
from nemo_qwen_hidden.parallel.watch import Limits
from nemo_qwen_hidden.progress import Phase
from nemo_qwen_hidden.store.format import MARKER
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.training.job import CHECKPOINTS, FinetuningJob, prepare
from nemo_qwen_hidden.training.started import fit_started
from tests.conftest import Start
from tests.parallel.helpers import all_end
from tests.recipes.commands import free_port, under_torchrun
from tests.support.models import relative_error

STATES = "states"
LONG_SECS = 300.0
TRAIN = TrainSettings(
    max_steps=8,
    lr=1e-3,
    seq_length=32,
    global_batch_size=4,
    validation_part=0.2,
    validation_every=4,
    validation_batches=1,
    checkpoint_every=2,
)
STEPS = ["train/0", "train/2", "validation/4", "train/4", "train/6", "validation/8"]


def job_at(folder: Path, **parallel: Any) -> FinetuningJob:
    settings = FinetuneSettings(
        train=TRAIN,
        run=RunSettings(path=str(folder)),
        parallel=ParallelSettings(**parallel),
        capture=CaptureSettings(hook_points=("resid_post@3",)),
        watch=WatchSettings(store=str(folder / STATES), every=2, phases=("train", "validation")),
    )
    return prepare(settings, world=None)


def fit_until_killed(rank: Rank, job: FinetuningJob, step: int, *, validating: bool = False) -> None:
    """Fine-tunes; the last rank is killed after ``step`` steps, or in the validation that follows them."""
    import lightning.pytorch as pl

    from nemo_qwen_hidden.training import run

    class Killer(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step and not validating and rank.rank == rank.world - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step and rank.rank == rank.world - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    watchers = run._watchers(job)
    with mock.patch.object(run, "_watchers", lambda job: [*watchers, Killer()]):
        fit_started(rank, job)


def fit_telling_rates(rank: Rank, job: FinetuningJob) -> None:
    """Fine-tunes, and sends the learning rate of each step, by the steps before it."""
    import lightning.pytorch as pl

    from nemo_qwen_hidden.training import run

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rank.send((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))

    with mock.patch.object(run, "_watchers", lambda job: [Rates()]):
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
    for step, validating, left in ((4, True, "step=1-last"), (5, False, "step=3-last")):
        with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
            start_ranks(2, partial(fit_until_killed, validating=validating), job_at(killed, tp=2), step)
        assert [path.name for path in job_at(killed, tp=2).checkpoints] == [left]
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
    assert [[f"{step.phase}/{step.step}" for step in store.steps] for store in stores] == [STEPS] * 3
    states = [np.asarray(store["resid_post@3"][:], np.float32) for store in stores]
    assert np.array_equal(states[1], states[0])
    assert relative_error(torch.from_numpy(states[2]), torch.from_numpy(states[0])) < 1e-4


def test_a_lora_goes_on_after_a_kill_and_its_checkpoint_opens(tmp_path: Path, start_ranks: Start) -> None:
    """In the same and in another layout; what the checkpoint has is the adapter alone, which gives the states that the
    run's probe set had at its end."""

    def lora(name: str, **parallel: Any) -> FinetuningJob:
        job = job_at(tmp_path / name, **parallel)
        watch = replace(job.settings.watch, probe_store=str(tmp_path / name / "probe"), probe_documents=3)
        train = replace(TRAIN, lora_dim=4, max_steps=6, recompute="uniform")
        return prepare(replace(job.settings, train=train, watch=watch), world=None)

    start_ranks(2, fit_started, lora("whole", tp=2))
    with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
        start_ranks(2, fit_until_killed, lora("killed", tp=2), 4)
    shutil.copytree(tmp_path / "killed", tmp_path / "moved")
    start_ranks(2, fit_started, lora("killed", tp=2))
    start_ranks(2, fit_started, lora("moved", pp=2))
    expected, same, other = (tensors_of(tmp_path / name) for name in ("whole", "killed", "moved"))
    assert same.keys() == expected.keys() and all(".adapter." in name for name in expected)
    assert any("exp_avg" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(same[name], tensor), name
        assert torch.allclose(other[name], tensor, rtol=0, atol=1e-4), name

    checkpoint = lora("whole", tp=2).checkpoints[-1]
    assert Adapter.of(checkpoint, read_architecture(lora("whole").model_folder).shape).dim == 4
    for name in ("whole", "killed", "moved"):
        probes = open_store(tmp_path / name / "probe")
        assert [step.step for step in probes.steps] == [0, 2, 4, 6]
        begun, ended = (probes.at(step=step).document(0) for step in (0, 6))
        ids = torch.from_numpy(ended.token_id[: TRAIN.seq_length].astype(np.int64))[None]
        found = torch.from_numpy(start_ranks(1, states_of, lora(name).checkpoints[-1], ids)[0])
        assert relative_error(found, ended["resid_post@3"][: TRAIN.seq_length].float()) < 5e-6
        assert relative_error(found, begun["resid_post@3"][: TRAIN.seq_length].float()) > 1e-3

    job = lora("whole")
    other = Path(shutil.copytree(job.model_folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"`model\.path` must be the model whose weights have the sha256"):
        start_ranks(1, fit_started, replace(job, model_folder=other))


def states_of(rank: Rank, adapter: Path, ids: torch.Tensor) -> Any:
    """Of the demo model with the adapter merged in."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel

    model = Qwen2HiddenModel.from_pretrained(adapter=adapter)
    (states,) = model.hidden_states(ids, hook_points=["resid_post@3"]).values()
    return states[0].numpy()


def test_a_run_begins_from_the_checkpoint_of_another(tmp_path: Path, start_ranks: Start) -> None:
    def one_step(name: str, model: Path | None) -> FinetuningJob:
        job = job_at(tmp_path / name)
        train = replace(TRAIN, max_steps=1, validation_part=0.0)
        watch = replace(job.settings.watch, phases=("train",))
        path = None if model is None else str(model)
        return prepare(replace(job.settings, train=train, model=ModelSettings(path=path), watch=watch), world=None)

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
    (record,) = job.run_path.glob("data/data.json")
    record.write_text(record.read_text().replace('"max_steps": 1', '"max_steps": 9'))
    shorter = replace(job.settings, train=replace(short.train, max_steps=4, lr=2e-3))
    refused = r"(?s)`train\.max_steps` must be at least 9, as .*`train\.lr` must be 0\.001, as"
    with pytest.raises(ConfigErrors, match=refused):
        start_ranks(1, fit_started, replace(job, settings=shorter))


def test_a_run_that_is_made_longer(tmp_path: Path) -> None:
    """With a rate that does not change it is the longer run, to the bit; else it has that one's rates from there on."""

    def fit(name: str, steps: int, **train: Any) -> tuple[Path, list[Any]]:
        events: list[Any] = []
        settings = FinetuneSettings(
            train=replace(TRAIN, max_steps=steps, validation_every=2, **train),
            run=RunSettings(path=str(tmp_path / name)),
        )
        job = prepare(settings, world=None)
        run_ranks(
            fit_telling_rates, (job,), world=1, log=tmp_path / "log", on_event=lambda _, event: events.append(event)
        )
        return job.run_path, events

    constant = {"min_lr": TRAIN.lr}
    whole, _ = fit("whole", 5, **constant)
    fit("longer", 2, **constant)
    longer, _ = fit("longer", 5, **constant)
    expected, found = tensors_of(whole), tensors_of(longer)
    assert found.keys() == expected.keys()
    for tensor, other in zip(expected.values(), found.values(), strict=True):
        assert torch.equal(tensor, other)
    least = TRAIN.lr / 4
    fit("cosine", 2, min_lr=least)
    _, events = fit("cosine", 5, min_lr=least)
    assert [each.text for each in events if isinstance(each, Phase)] == [
        "resuming after step 2",
        "learning rates are those of 5 steps from step 2 on",
    ]
    rates = {step: rate for each in events if isinstance(each, tuple) for step, rate in [each]}
    expected_rates = {step: least + (TRAIN.lr - least) * (1 + np.cos(np.pi * step / 5)) / 2 for step in (2, 3, 4)}
    assert rates == pytest.approx(expected_rates)


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
    with finetuning.locked(job):
        pass
    assert checkpoint.is_dir() and not mark.exists() and job.unfinished == []
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step=2-last"]


HOLDS = """
import sys
from pathlib import Path
from nemo_qwen_hidden.store.write.locks import job_lock, rank_lock
from nemo_qwen_hidden.training.job import RUN
folder = Path(sys.argv[2])
with job_lock(folder, of=RUN) if sys.argv[1] == "job" else rank_lock(folder, of=RUN):
    print("held", flush=True)
    sys.stdin.readline()
"""


def finetune(folder: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What the command says, which is refused."""
    assert main(["finetune", "--quiet", f"run.path={folder}", "parallel.tp=2"]) == 2
    return capfd.readouterr().err.splitlines()


def test_a_folder_where_a_run_works_is_refused(
    tmp_path: Path, start_python: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said by one rank; who holds it, or held it and is not gone yet, is named; a process that was killed holds
    nothing."""
    (folder := tmp_path / "run").mkdir()
    checkpoint = folder / CHECKPOINTS / "step=5-last"
    checkpoint.mkdir(parents=True)
    (mark := checkpoint.with_name("step=5-last-unfinished")).touch()
    holder = start_python(HOLDS, "job", folder)
    assert holder.stdout.readline() == "held\n"
    by = f"process {holder.pid} on {socket.gethostname()}, since "
    refused = f"nemo-qwen-hidden: `run.path` must be a folder that no other run is working on; {by}"
    (said,) = finetune(folder, capfd)
    assert said.startswith(refused)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    (said,) = finetune(folder, capfd)
    assert said.startswith(refused)
    assert mark.exists()
    orphan = start_python(HOLDS, "rank", folder)
    assert orphan.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    monkeypatch.setattr(finetuning, "job_lock", partial(finetuning.job_lock, patience_secs=0.1))
    (said,) = finetune(folder, capfd)
    assert f"no rank writes to; one of an earlier run does (process {orphan.pid} on" in said
    orphan.kill()
    orphan.wait()
    with finetuning.locked(job_at(folder)):
        assert not mark.exists()


def hang_under_torchrun(rank: Rank, job: FinetuningJob, port: int) -> None:
    """As rank of torchrun's; the last one is frozen in the second step."""
    import lightning.pytorch as pl

    from nemo_qwen_hidden.cli import finetune
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.parallel import peers
    from nemo_qwen_hidden.training import run

    class Freezer(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2 and rank.rank == rank.world - 1:
                os.kill(os.getpid(), signal.SIGSTOP)

    rank.send(os.getpid())
    os.environ |= under_torchrun(rank, port)
    terminal = mock.Mock(spec=Terminal, error=rank.send)
    watched = partial(peers.watched, limits=Limits(beat_secs=0.5, silent_secs=10.0, still_secs=LONG_SECS))
    with (
        mock.patch.object(run, "_watchers", lambda job: [Freezer()]),
        mock.patch.object(peers, "watched", watched),
    ):
        finetune._be_a_rank(job, terminal, finetune._Teller(terminal))


def test_under_torchrun_a_frozen_rank_ends_all(tmp_path: Path, start_ranks: Start) -> None:
    """Said once, by another rank, through what torchrun's ranks share; the starter of the test's ranks is patient."""
    heard: list[Any] = []
    job = job_at(tmp_path / "run", tp=2)
    with pytest.raises(RankError, match=r"ended without a word|was ended by SIGKILL"):
        run_ranks(
            hang_under_torchrun,
            (job, free_port()),
            world=2,
            log=tmp_path / "ranks.log",
            on_event=lambda _, event: heard.append(event),
        )
    pids, said = [[event for event in heard if isinstance(event, kind)] for kind in (int, str)]
    assert len(pids) == 2 and all_end(pids)
    assert len(said) == 2 and re.match(r"rank 1 has shown no sign of life for \d+ s \(more in ", said[0])
    assert said[1] == f"no checkpoint is left at {job.run_path}"
    with finetuning.locked(job):  # nobody holds it any more
        pass


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
        (TrainSettings(lora_dim=0), r"train\.lora_dim"),
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
    virtual = replace(virtual, train=TrainSettings(lora_dim=4))
    with pytest.raises(ConfigError, match=r"`parallel\.vp` must be 1 where `train\.lora_dim` is given"):
        prepare(virtual, world=None)
    assert not (tmp_path / "run").exists()
