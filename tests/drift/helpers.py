"""Stores of a probe set, as training makes them: a part for each captured step, with the same documents."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.captured import CapturedStep
from nemo_qwen_hidden.store.read.reader import Store, open_store
from nemo_qwen_hidden.store.write.step_files import States as Pieces
from nemo_qwen_hidden.store.write.step_files import StepFiles, check_shares
from nemo_qwen_hidden.store.write.steps import GrowingStore, StepDocument
from tests.store.growing import description
from tests.store.helpers import Run

POINTS = (HookPoint("embed"), HookPoint("resid_post", 0), HookPoint("resid_post", 3))
LENGTHS = (5, 9, 1, 12, 7, 8)
States = Mapping[int, Mapping[HookPoint, NDArray[np.float32]]]


def random_steps(
    steps: Sequence[int] = (0, 5, 10), *, rows: int = sum(LENGTHS), width: int = 6, seed: int = 0
) -> dict[int, dict[HookPoint, NDArray[np.float32]]]:
    """States [rows, width] of each hook point at each step, farther and farther from those of the first."""
    rng = np.random.default_rng(seed)
    first = {point: rng.standard_normal((rows, width)) for point in POINTS}
    return {
        step: {
            point: (values + 0.2 * number * rng.standard_normal(values.shape)).astype(np.float32)
            for point, values in first.items()
        }
        for number, step in enumerate(steps)
    }


def make_steps(
    path: Path,
    states: States,
    *,
    token_ids: Mapping[int, ArrayLike] | ArrayLike | None = None,
    lengths: Sequence[int] = LENGTHS,
    shard_rows: int = 11,
    kept: Sequence[int] | None = None,
    phase: str = "probe",
    names: Sequence[str] | None = None,
) -> Store:
    """A finished store. token_ids: of all steps, or of each. kept: positions in each document whose states are stored,
    all by default. names: ids of the documents."""
    given = np.random.default_rng(7).integers(0, 9, sum(lengths)) if token_ids is None else token_ids
    first = next(iter(states.values()))
    what = description(tuple(first), hidden_size=next(iter(first.values())).shape[1])
    with GrowingStore(path, what, shard_rows=shard_rows) as store:
        files = StepFiles(path, store.producers)
        for step, by_point in states.items():
            ids = np.asarray(given[step] if isinstance(given, Mapping) else given, np.int32)
            captured = CapturedStep(phase=phase, step=step, samples=((0, len(lengths)),))
            begun = store.begin(captured, _documents(ids, lengths, kept, names))
            runs = [Run(0, begun.target.states)]
            written = files.write(
                begun, [Pieces(point=p, runs=runs, values=torch.from_numpy(x)) for p, x in by_point.items()]
            )
            store.add(files.seal(begun, list(begun.target.missing()), check_shares(begun.target, [written])))
        files.sync()
        files.close()
    return open_store(path)


def _documents(
    token_ids: NDArray[np.int32], lengths: Sequence[int], kept: Sequence[int] | None, names: Sequence[str] | None
) -> list[StepDocument]:
    return [
        StepDocument(
            id=names[index] if names else f"doc-{index}",
            source="docs.jsonl",
            token_ids=token_ids[start:stop],
            kept=None if kept is None else np.array([k for k in kept if k < stop - start], np.int64),
        )
        for index, (start, stop) in enumerate(pairwise(accumulate(lengths, initial=0)))
    ]
