"""Stores of a probe set, as training makes them: a part for each captured step, with the same documents."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import Part
from nemo_qwen_hidden.store.read.reader import Store, open_store
from nemo_qwen_hidden.store.write import session
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter
from tests.store.helpers import draft, finish, write_states

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
    dtype: str = "fp32",
    kept: Sequence[int] | None = None,
    phase: str = "probe",
    names: Sequence[str] | None = None,
) -> Store:
    """A finished store, its steps in the order of ``states``. token_ids: of all steps, or of each. kept: positions in
    each document whose states are stored, all by default."""
    given = np.random.default_rng(7).integers(0, 9, sum(lengths)) if token_ids is None else token_ids
    first = next(iter(states.values()))
    with session.locked(path):
        with session.staging(path) as staged:
            parts: list[Part] = []
            for number, step in enumerate(states):
                ids = np.asarray(given[step] if isinstance(given, Mapping) else given, np.int32)
                part = _tokens(staged, number, f"{phase}/{step}/", ids, lengths, shard_rows, kept, names)
                rows = (sum(p.rows for p in parts), sum(p.documents for p in parts))
                data = {"phase": phase, "step": step}
                parts.append(replace(part, first_row=rows[0], first_document=rows[1], data=data))
            width = next(iter(first.values())).shape[1]
            target = draft(*parts, points=tuple(first), hidden_size=width, stored_dtype=dtype)
            session.start(path, target, {}, staged=staged)
        joined = {
            point: torch.from_numpy(np.concatenate([values[point] for values in states.values()])) for point in first
        }
        stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        write_states(
            path, target, {point: values.to(stored) for point, values in joined.items()}, [range(target.states)]
        )
        finish(path, target)
    return open_store(path)


def _tokens(
    folder: Path,
    number: int,
    prefix: str,
    token_ids: NDArray[np.int32],
    lengths: Sequence[int],
    shard_rows: int,
    kept: Sequence[int] | None,
    names: Sequence[str] | None,
) -> Part:
    with TokenTableWriter(folder, shard_rows=shard_rows, part=number) as writer:
        for index, (start, stop) in enumerate(pairwise(accumulate(lengths, initial=0))):
            inside = None if kept is None else np.array([k for k in kept if k < stop - start], np.int64)
            name = names[index] if names else f"doc-{index}"
            writer.append(document_id=prefix + name, source="docs.jsonl", token_ids=token_ids[start:stop], kept=inside)
    return writer.close()
