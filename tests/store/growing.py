"""Captured steps for tests of the store: the same truth whoever writes it."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.captured import CapturedStep, consecutive
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.write.step_files import States, StepFiles, check_shares
from nemo_qwen_hidden.store.write.steps import GrowingStore, StepDocument
from tests.store.helpers import POINTS, Run, draft

LENGTHS = (3, 7, 1, 6)
SHARD_ROWS = 5


def description(points: Iterable[HookPoint] = POINTS[:2], **changes: Any) -> Manifest:
    """What a store of captured steps is, before there is one."""
    model = {"path": "tiny", "weights_sha256": "0" * 64}
    return draft(points=points, **({"producers": ({"work": "captured"},), "model": model} | changes))


def documents(step: int, lengths: Sequence[int] = LENGTHS, *, kept: bool = False) -> list[StepDocument]:
    """Samples of a step; where some tokens alone are kept, every second one."""
    drawn = np.random.default_rng(step)
    return [
        StepDocument(
            id=str(10 * step + number),
            source="train",
            token_ids=drawn.integers(0, 1000, length, dtype=np.int32),
            kept=np.arange(0, length, 2) if kept else None,
        )
        for number, length in enumerate(lengths)
    ]


def values(step: int, point: HookPoint, states: int, hidden_size: int = 6) -> torch.Tensor:
    """fp32 [states, H], the truth."""
    seed = 1000 * step + sum(str(point).encode())
    return torch.randn(states, hidden_size, generator=torch.Generator().manual_seed(seed))


def capture(
    store: GrowingStore,
    ranks: Sequence[StepFiles],
    step: int,
    phase: str = "train",
    *,
    lengths: Sequence[int] = LENGTHS,
    kept: bool = False,
) -> None:
    """Adds a step whose states the ranks have by turns, two of them at a time; not committed."""
    samples = consecutive(range(10 * step, 10 * step + len(lengths)))
    begun = store.begin(CapturedStep(phase=phase, step=step, samples=samples), documents(step, lengths, kept=kept))
    target, shares = begun.target, []
    for number, files in enumerate(ranks):
        mine = [range(first, min(first + 2, target.states)) for first in range(0, target.states, 2)]
        runs = [Run(each.start, len(each)) for each in mine[number :: len(ranks)]]
        pieces = []
        for point in target.points:
            whole = values(step, point, target.states, target.entry(point).width)
            taken = torch.cat([whole[:0], *(whole[run.first_row : run.first_row + run.length] for run in runs)])
            pieces.append(States(point=point, runs=runs, values=taken))
        shares.append(files.write(begun, pieces))
    errors, missing = check_shares(target, shares), list(target.missing())
    sealed = {}
    for number, files in enumerate(ranks):
        sealed |= files.seal(begun, missing[number :: len(ranks)], errors)
    store.add(sealed)


def commit(store: GrowingStore, ranks: Sequence[StepFiles], *, publish: bool = False) -> None:
    for files in ranks:
        files.sync()
    store.commit(publish=publish)


def grow(
    path: Path,
    steps: Iterable[tuple[str, int]],
    *,
    ranks: int = 1,
    resume_at: int | None = None,
    staying: Collection[str] = (),
    begins: bool = False,
    kept: bool = False,
    what: Manifest | None = None,
    commits: bool = True,
) -> Manifest:
    """A store of these (phase, step), or one that goes on with them, finished."""
    with ExitStack() as stack:
        how = {"resume_at": resume_at, "staying": staying, "begins": begins, "shard_rows": SHARD_ROWS}
        store = GrowingStore(path, what or description(), **how)  # type: ignore[arg-type]
        stack.enter_context(store)
        files = [StepFiles(path, store.producers) for _ in range(ranks)]
        for phase, step in steps:
            capture(store, files, step, phase, kept=kept)
            if commits:
                commit(store, files)
        for each in files:
            each.sync()
            each.close()
    return store.manifest


def without_producers(manifest: Manifest) -> Manifest:
    """For comparing stores that different jobs have made."""
    return replace(manifest, producers=())
