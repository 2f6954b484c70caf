"""What a plan says of a fine-tuning run, beside what the run then did."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.config import (
    CaptureSettings,
    FinetuneSettings,
    ParallelSettings,
    RunSettings,
    TrainSettings,
    WatchSettings,
)
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.plan.stages import stages_of
from nemo_qwen_hidden.plan.training import passes
from nemo_qwen_hidden.plan.training_memory import Training, held_bytes
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.topology import Topology
from nemo_qwen_hidden.training.job import CHECKPOINTS, FinetuningJob, prepare
from nemo_qwen_hidden.training.outlook import outline, outlook
from nemo_qwen_hidden.training.started import fit_started
from tests.conftest import Start
from tests.support.models import Tiny, save_tiny
from tests.support.training import LAYOUTS, SEQ_LENGTH, VOCAB, Job, train_one

FULL = {"recompute_granularity": "full"}
RECOMPUTE: dict[tuple[str, int], dict[str, Any]] = {
    ("selective", 1): {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ("uniform", 2): {**FULL, "recompute_method": "uniform", "recompute_num_layers": 2},
    ("block", 1): {**FULL, "recompute_method": "block", "recompute_num_layers": 1},
}
PIPELINES = ((2, 1, 5), (4, 1, 8), (4, 1, 2), (2, 2, 4), (3, 2, 6), (4, 3, 8))


def saved_in(rank: Rank, folder: Path, jobs: Sequence[Job]) -> list[int]:
    """Of each job, the most bytes that autograd kept on this rank."""
    import lightning.pytorch as pl

    from tests.support.saved import Saved

    found = []
    for job in jobs:
        saved = Saved()

        class Weights(pl.Callback):
            def on_train_start(self, trainer: Any, *_: Any, saved: Saved = saved) -> None:
                saved.ignore(trainer.strategy.megatron_parallel.parameters())

        with saved.counting():
            train_one(rank, job, folder, [Weights()])
        found.append(saved.most_bytes)
    return found


def schedules(_: Rank) -> list[list[tuple[bool, int]]]:
    """Of each rank of ``PIPELINES``, forward and backward passes by Megatron's own tables."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    found = []
    for pp, vp, microbatches in PIPELINES:
        for rank in range(pp):
            group = SimpleNamespace(size=lambda pp=pp: pp, rank=lambda rank=rank: rank)
            known = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vp if vp > 1 else None)
            *_, ahead, _ = get_pp_rank_microbatches(microbatches, vp, pp, p2p_communicator=known)
            size = pp if vp > 1 else microbatches
            forward = [(True, chunk) for _, chunk in get_schedule_table(microbatches, vp, size)]
            back = [(False, vp - 1 - chunk) for _, chunk in forward]
            steady = [each for pair in zip(forward[ahead:], back, strict=False) for each in pair]
            found.append([*forward[:ahead], *steady, *back[len(forward) - ahead :]])
    return found


def saved_and_schedules(rank: Rank, folder: Path, jobs: Sequence[Job]) -> Any:
    return saved_in(rank, folder, jobs), schedules(rank)


def test_activations_are_those_that_autograd_keeps(tmp_path: Path, start_ranks: Start) -> None:
    """In every layout of two ranks and with everything that can be computed again; and the schedule is Megatron's."""
    folder = save_tiny(tmp_path / "model", Tiny(layers=4, groups=2, tied=True), vocab_size=VOCAB)
    kinds = [(topology, ("none", 1), {}) for topology in LAYOUTS[2] if topology.dp == 1]
    kinds += [(Topology(pp=2), how, model) for how, model in RECOMPUTE.items()]
    jobs = [Job(topology=topology, steps=1, model=dict(model)) for topology, _, model in kinds]
    ranks = start_ranks(2, saved_and_schedules, folder, jobs)
    expected = [
        list(passes(Topology(pp=pp, vp=vp), rank, microbatches))
        for pp, vp, microbatches in PIPELINES
        for rank in range(pp)
    ]
    assert ranks[0][1] == expected
    for number, ((topology, (how, layers), _), job) in enumerate(zip(kinds, jobs, strict=True)):
        run = Training(
            shape=read_architecture(folder).shape,
            topology=topology,
            stages=stages_of(4, pp=topology.pp, vp=topology.vp),
            tied=True,
            itemsize=4,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            microbatches=job.global_batch_size // topology.dp,
            recompute=how,
            recompute_layers=layers,
        )
        for rank, (saved, _) in enumerate(ranks):
            planned = held_bytes(run, topology.at(rank).pp)
            assert 0.95 < saved[number] / planned < 1.02, (topology, how, layers, rank)


@dataclass
class Done:
    """What a rank saw."""

    microbatches: set[int] = field(default_factory=set)
    steps: int = 0
    validations: list[int] = field(default_factory=list)
    most_bytes: int = 0
    trained: int = 0


def fit_watched(rank: Rank, job: FinetuningJob) -> Done:
    import lightning.pytorch as pl
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from nemo_qwen_hidden.training import run
    from tests.support.saved import allocations

    done = Done()

    class Watcher(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            done.steps += 1
            weights = trainer.strategy.megatron_parallel.parameters()
            done.trained = sum(weight.numel() for weight in weights if weight.requires_grad)
            done.microbatches.add(get_num_microbatches())

        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            done.validations.append(trainer.global_step)

    watchers = run._watchers
    watched = mock.patch.object(run, "_watchers", lambda job: [*watchers(job), Watcher()])
    with watched, allocations(rank.rendezvous.with_name(f"trace-{rank.rank}.json")) as most:
        fit_started(rank, job)
    done.most_bytes = most[0]
    return done


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_does_what_was_planned(tmp_path: Path, start_ranks: Start) -> None:
    train = TrainSettings(
        max_steps=6,
        seq_length=64,
        global_batch_size=4,
        micro_batch_size=2,
        validation_part=0.3,
        validation_every=2,
        validation_batches=2,
        checkpoint_every=2,
        keep_checkpoints=1,
    )
    watch = WatchSettings(
        store=str(tmp_path / "states"),
        every=4,
        phases=("train", "validation"),
        probe_store=str(tmp_path / "probes"),
        probe_documents=6,
        probe_labels=None,
    )
    settings = FinetuneSettings(
        train=train,
        run=RunSettings(path=str(tmp_path / "run")),
        parallel=ParallelSettings(tp=2),
        capture=CaptureSettings(hook_points=("resid_post@1", "z@3", "final_norm")),
        watch=watch,
    )
    job = prepare(settings, world=None)
    planned = outlook(job)
    assert outline(job).stores == planned.stores
    assert not any(tmp_path.iterdir())
    ranks = start_ranks(2, fit_watched, job)
    for done in ranks:
        assert done.steps == len(range(planned.first_step, train.max_steps)) == 6
        assert done.microbatches == {planned.microbatches} == {2}
        assert done.validations == list(planned.validations) == [2, 4, 6]
    counts = planned.counts
    assert counts is not None and counts.exact
    blocks = {name: np.load(tmp_path / f"run/data/{name}.npy") for name in ("train", "validation")}
    assert (counts.train, counts.validation) == tuple(map(len, blocks.values()))
    assert planned.block_bytes == sum(each.nbytes for each in blocks.values())
    for store in planned.stores:
        there = open_store(store.path)
        steps = [(each.phase, step) for each in store.captured for step in each.steps]
        assert sorted((step.phase, step.step) for step in there.steps) == sorted(steps)
        assert there.rows == sum(len(each.steps) * each.rows for each in store.captured)
        assert size(store.path) == pytest.approx(store.bytes, rel=0.01)
    kept, most = planned.checkpoints
    checkpoints = list((tmp_path / "run" / CHECKPOINTS).iterdir())
    assert len(checkpoints) == kept == most - 1 == 2
    for checkpoint in checkpoints:
        assert size(checkpoint) == pytest.approx(planned.checkpoint_bytes, rel=0.02)
    (need,) = planned.memory
    for done in ranks:  # no more than two steps wait for the disk, and mostly none does
        assert need.total - need.queue < 1.1 * done.most_bytes < 1.1 * 1.05 * need.total
    lora = replace(train, lora_dim=8, max_steps=2)
    job = prepare(
        replace(settings, train=lora, watch=WatchSettings(), run=RunSettings(path=str(tmp_path / "lora"))), world=None
    )
    adapted, ranks = outlook(job), start_ranks(2, fit_watched, job)
    (need,) = adapted.memory
    for done in ranks:
        assert done.trained == need.trained
        assert need.total < 1.1 * done.most_bytes < 1.1 * 1.1 * need.total  # gloo holds more exchanges, of adapters
    # of an adapter this small, what stands around the numbers is a large part
    assert size(job.checkpoints[-1]) == pytest.approx(adapted.checkpoint_bytes, rel=0.15)
    again = outlook(prepare(replace(settings, train=replace(train, max_steps=6)), world=None))
    assert again.first_step == 6 and again.block_bytes == 0
    assert again.counts is not None and again.counts.documents is None
    assert (again.counts.train, again.counts.validation) == (counts.train, counts.validation)
