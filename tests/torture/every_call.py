"""Kills a job of the store alone, without ranks, at each of its calls that change files, one after the other.

``python -m tests.torture.every_call --seed 1 [--rounds 3]``: where ``harness`` leaves it to chance, and needs NeMo,
this one misses no call. Most kills are followed by a power cut.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.write import place, session
from nemo_qwen_hidden.store.write.step_files import StepFiles
from nemo_qwen_hidden.store.write.steps import GrowingStore
from nemo_qwen_hidden.store.write.writer import ShardWriter
from tests.store.growing import capture, commit, description
from tests.store.helpers import LAYERS, POINTS, Run, draft, random_states, seal_all, truth, write_states, write_tokens
from tests.torture.claims import check_claims, check_same, insist
from tests.torture.faults import Watch, install
from tests.torture.powercut import cut_power, events, forget

Job = Callable[[Path], None]
LENGTHS = (3, 0, 7, 1)
SHARD_ROWS = 4
STEPS = 4
ADDED = HookPoint("resid_post", 1)


def new(path: Path) -> None:
    """A store of its own."""
    _work(path, POINTS[:2], {"work": "new"})


def overwriting(path: Path) -> None:
    """The same over what another model's job has left; once it has begun, it is resumed."""
    _work(path, POINTS[:2], {"work": "new"}, overwrites=True)


def replacing(path: Path) -> None:
    """The same over a finished store of other documents."""
    overwriting(path)


def adding(path: Path) -> None:
    """A hook point more."""
    with place.locked(path):
        found = session.find(path)
        assert found.finished is not None or found.unfinished is not None
        if found.unfinished is None:
            finished = found.finished
            assert finished is not None
            if ADDED in finished.points:
                return
            entry = HookPointEntry.of(
                ADDED, num_layers=LAYERS, shards=finished.grid.shards, shape=(finished.hidden_size,)
            )
            target = replace(finished, hook_points=(*finished.hook_points, entry))
            session.start(path, target, {}, fresh=False)
        else:
            target = found.unfinished
            session.resume(path, target, {})
        _write(path, target)


def growing(path: Path) -> None:
    """A store of captured steps, which goes on after those that it has."""
    with GrowingStore(path, description(stored_dtype="bf16"), shard_rows=SHARD_ROWS) as store:
        ranks = [StepFiles(path, store.producers) for _ in range(2)]
        for step in range(len(store.manifest.parts), STEPS):
            capture(store, ranks, step)
            if step % 2:
                commit(store, ranks, publish=step == 1)
        for files in ranks:
            files.sync()
            files.close()


def going_back(path: Path) -> None:
    """The same over steps of which the last two are dropped and captured again; once it has begun it just goes on."""
    if (path / "unfinished.json").exists():
        growing(path)
        return
    steps = len(Manifest.from_json((path / "manifest.json").read_bytes()).parts)
    with GrowingStore(path, description(stored_dtype="bf16"), resume_at=steps - 2, shard_rows=SHARD_ROWS):
        pass
    growing(path)


JOBS: tuple[Job, ...] = (new, overwriting, replacing, adding, growing, going_back)


def _work(path: Path, points: tuple[HookPoint, ...], producer: dict[str, str], *, overwrites: bool = False) -> None:
    with place.locked(path):
        found = session.find(path)
        with session.staging(path) as staged:
            part, _ = write_tokens(staged, LENGTHS, shard_rows=SHARD_ROWS)
            target = draft(part, points=points, producers=(producer,), stored_dtype="bf16")
            ours = found.unfinished or found.finished
            if ours is not None and overwrites and ours.producers[0] != producer:
                found = session.Found(finished=None, unfinished=None)
            if found.unfinished is not None:
                session.resume(path, target, {}, staged=staged)
            elif found.finished is not None:
                return
            else:
                session.start(path, target, {}, staged=staged)
        _write(path, target)


def _write(path: Path, target: Manifest) -> None:
    """A few rows at a time, each of them made durable; most shards are sealed meanwhile, others after a kill at the
    end."""
    _, done = session.progress(path, target)
    with ShardWriter(path, target, rank=0, done=done, commit_secs=0.0, sealing_threads=2) as writer:
        for first in range(0, target.rows, 3):
            for seed, point in enumerate(target.points):
                size = min(3, target.rows - first)
                values = random_states(target.rows, target.hidden_size, "fp32", seed)
                writer.write(point, [Run(first, size)], values[first : first + size])
    seal_all(path, target)
    session.finish(path, target)


def _prepared(job: Job, store: Path) -> None:
    """What ``job`` finds."""
    if job is adding:
        new(store)
    elif job is going_back:
        growing(store)
    elif job is growing:
        pass
    elif job is not new:
        _leave_other(store, documents=7 if job is overwriting else 8, finished=job is replacing)


def _leave_other(store: Path, *, documents: int, finished: bool) -> None:
    """Other states of a hook point that the new job has too, and of others; every shard is done."""
    with place.locked(store):
        with session.staging(store) as staged:
            part, _ = write_tokens(staged, LENGTHS, shard_rows=SHARD_ROWS, seed=documents)
            target = draft(part, points=(POINTS[0], *POINTS[2:]), stored_dtype="bf16")
            session.start(store, target, {}, staged=staged)
        write_states(store, target, {point: -values for point, values in truth(target).items()})
        seal_all(store, target)
        if finished:
            session.finish(store, target)


def _in_a_fork(job: Job, watch: Watch | None, store: Path) -> int:
    """The exit status of ``job``, negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            if watch is not None:
                install(watch)
            job(store)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fresh(folder: Path, job: Job) -> Watch:
    shutil.rmtree(folder, ignore_errors=True)
    watch = Watch(role="coordinator", store=folder / "store", folder=folder)
    for made in (watch.kept, watch.pids):
        made.mkdir(parents=True)
    _prepared(job, watch.store)
    forget(watch)
    return watch


def _has_begun(store: Path) -> bool:
    """Whether what lies there is the new store and no longer the old one."""
    if not (store / "unfinished.json").exists():
        return False
    found = session.find(store).unfinished
    return found is not None and found.points == POINTS[:2]


def torture(job: Job, folder: Path, chance: random.Random, *, step: int = 1) -> int:
    """Kills ``job`` at every ``step``-th call, from a random one on; returns how often.

    Raises:
        Broken: a promise was.
    """
    reference = _fresh(folder / "reference", job)
    insist(_in_a_fork(job, reference, reference.store) == 0, "an undisturbed job finishes")
    calls = [event[3] for event in events(reference) if event[0].islower() and len(event) > 3]
    chosen = range(chance.randrange(step), len(calls), step)
    for number in chosen:
        name = calls[number]
        watch = _fresh(folder / "killed", job)
        moment = chance.choice(["before", "half", "after"])
        dies = ("coordinator", name, calls[: number + 1].count(name))
        told = f"{job.__name__}, {moment} call {number} of {len(calls)}: {name} {dies[2]}"
        _in_a_fork(job, replace(watch, dies=dies, moment=moment), watch.store)
        cut = chance.random() < 0.7
        spoilt = cut_power(watch, chance) if cut else []
        try:
            if job in (new, adding, growing, going_back) or _has_begun(watch.store):
                check_claims(watch.store, reference.store, same=True, cut=cut, replacing=job is replacing)
            insist(_in_a_fork(job, None, watch.store) == 0, "the same command resumes and finishes")
            check_same(watch.store, reference.store, same=True)
        except Exception:
            print("\n".join([f"BROKEN: {told}", *spoilt]), file=sys.stderr, flush=True)
            raise
    return len(chosen)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.every_call", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--step", type=int, default=1, help="leave calls out")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="every-call-") as folder:
        for seed in range(asked.seed, asked.seed + asked.rounds):
            chance = random.Random(seed)
            for job in JOBS:
                kills = torture(job, Path(folder), chance, step=asked.step)
                print(f"seed {seed}: {kills} kills of {job.__name__}", flush=True)
    print("no promise broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
