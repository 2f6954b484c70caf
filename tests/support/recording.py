"""Made-up states of captured steps, as the taps of each rank would have them, through a ``Recorder``."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Place, Topology

POINTS = (HookPoint("embed"), HookPoint("resid_post", 0), HookPoint("resid_post", 3), HookPoint("final_norm"))
LENGTHS = (5, 12, 1, 9, 12, 3, 7, 2)  # of the samples of a step: 4 microbatches of 2 in all
HIDDEN = 6


def truth(point: HookPoint, phase: str, step: int, sample: int) -> torch.Tensor:
    """fp32 [tokens, H] of one sample."""
    seed = hash_of(f"{point} {phase} {step} {sample}")
    length = LENGTHS[sample % len(LENGTHS)]
    return torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def token_ids(sample: int) -> np.ndarray:
    return np.random.default_rng(sample).integers(0, 300, LENGTHS[sample % len(LENGTHS)], dtype=np.int32)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[:40], "little") % (2**31)


def description(points: Sequence[HookPoint] = POINTS) -> Any:
    """The same on every rank and in every layout, so that stores can be compared byte for byte."""
    from nemo_qwen_hidden.store.entries import HookPointEntry
    from nemo_qwen_hidden.store.manifest import Manifest

    entries = (HookPointEntry.of(point, num_layers=4, shards=0, shape=(HIDDEN,)) for point in points)
    return Manifest(
        hidden_size=HIDDEN,
        compute_dtype="fp32",
        stored_dtype="fp32",
        hook_points=tuple(entries),
        parts=(),
        producers=({"work": "captured"},),
    )


def states_of(place: Place, phase: str, step: int, *, every: int | None = None) -> Any:
    """What the rank at ``place`` has of a step. every: keep each so-manieth token alone."""
    from nemo_qwen_hidden.capture.rows import Choice, view_of
    from nemo_qwen_hidden.capture.taps import LocalSlice
    from nemo_qwen_hidden.plan.microbatches import Microbatch, Segment
    from nemo_qwen_hidden.training.watch.step_states import ROW_STRIDE, Sample, StepStates

    topology, first = place.topology, step * len(LENGTHS)
    samples, slices = [], []
    choice = None if every is None else Choice(kept=lambda _row, length: list(range(0, length, every)))
    for index in range(place.dp, len(LENGTHS) // 2, topology.dp):
        numbers = range(first + 2 * index, first + 2 * index + 2)
        if (place.tp, place.cp, place.pp) == (0, 0, 0):
            for number in numbers:
                kept = None if every is None else np.arange(0, len(token_ids(number)), every)
                samples.append(Sample(number=number, id=None, token_ids=token_ids(number), kept=kept))
        segments = [Segment(first_row=number * ROW_STRIDE, length=len(token_ids(number))) for number in numbers]
        microbatch = Microbatch(index=index, segments=tuple(segments), tokens=12, packed=False)
        if choice is not None:  # whole samples are chosen from; a rank has parts of them
            view = view_of(microbatch, replace(topology, tp=1, cp=1, sp=False), cp=0, tp=0, choice=choice)
        else:
            view = view_of(microbatch, topology, cp=place.cp, tp=place.tp, choice=None)
        for number, point in enumerate(POINTS):
            if number * topology.pp // len(POINTS) != place.pp or (choice is not None and place.tp):
                continue
            rows = []
            for run in view.runs:
                sample, position = divmod(run.first_row, ROW_STRIDE)
                whole = truth(point, phase, step, sample)[position : position + run.length]
                rows.append(whole if run.picked is None else whole[list(run.picked)])
            if rows:
                slices.append(LocalSlice(hook_point=point, microbatch=index, runs=view.runs, values=torch.cat(rows)))
    return StepStates(phase=phase, step=step, samples=tuple(samples), slices=tuple(slices))


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A store in a layout. alter: what a rank has of a step made something else. ends: at this step, by its rank."""

    path: Path
    topology: Topology
    steps: tuple[tuple[str, int], ...] = tuple(("train", step) for step in range(4))
    every: int | None = None
    resume_at: int | None = None
    ends: tuple[int, int] | None = None
    alter: Callable[[int, Any], Any] | None = None
    arguments: tuple[tuple[str, Any], ...] = ()


def record(rank: Rank, recordings: Sequence[Recording]) -> list[Any]:
    """One store after another over the same ranks; of each how many steps were put, and the error that ended it."""
    return [_record(rank, number, each) for number, each in enumerate(recordings)]


def _record(rank: Rank, number: int, asked: Recording) -> tuple[int, str]:
    import torch.distributed as dist

    from nemo_qwen_hidden.errors import HiddenStatesError
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.training.watch.recorder import Recorder

    torch.set_num_threads(1)
    meeting = rank.rendezvous.with_name(f"{rank.rendezvous.name}-{number}")
    put = 0
    with process_groups(asked.topology, rank=rank.rank, rendezvous=meeting) as groups:
        drawn = torch.random.get_rng_state()
        recorder = None
        try:
            recorder = Recorder(
                asked.path, description(), groups, resume_at=asked.resume_at, shard_rows=16, **dict(asked.arguments)
            )
            for phase, step in asked.steps:
                states = states_of(groups.place, phase, step, every=asked.every)
                if asked.ends == (rank.rank, step):
                    os._exit(9)
                recorder.put(states if asked.alter is None else asked.alter(rank.rank, states))
                put += 1
                dist.barrier()  # as the next training step is one
            recorder.close()
            recorder.close()
            said = ""
        except HiddenStatesError as error:
            said = f"{type(error).__name__}: {error}"
            if recorder is not None:
                recorder.abandon()
        assert torch.equal(drawn, torch.random.get_rng_state())
        dist.barrier()
    return put, said


def nan_on_rank_1(rank: int, states: Any) -> Any:
    if rank == 1 and states.step == 1:
        states.slices[0].values[0, 0] = torch.nan
    return states


def same_step_twice(rank: int, states: Any) -> Any:
    return replace(states, step=1) if states.step == 2 else states


def another_step_on_rank_1(rank: int, states: Any) -> Any:
    return replace(states, phase="validation") if rank == 1 and states.step == 1 else states


def lost_slice(rank: int, states: Any) -> Any:
    return replace(states, slices=states.slices[1:]) if rank == 1 and states.step == 0 else states
