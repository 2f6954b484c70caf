"""A contestant's states against ours in fp32, token by token, before and while it is timed."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rivals.rival import Contestant
from benchmarks.work import BF16, FP32, Case, Errors
from nemo_qwen_hidden import open_store


class WrongStatesError(Exception):
    """A contestant's states are not those that were asked for."""


TOLERANCES = {FP32: Errors(median=1e-5, largest=1e-4), BF16: Errors(median=0.03, largest=0.3)}
"""benchmarks/README.md says what was found, and why bf16 has these."""


def check(contestant: Contestant, case: Case, documents: Sequence[int], folder: Path, reference: Path) -> Errors:
    """Compares what was written to ``folder`` with the store ``reference``, which has all documents and hook points.

    Raises:
        WrongStatesError: a document or hook point is missing or there twice, has another number of tokens, or differs
            by more than its dtype accounts for.
    """
    work = contestant.work
    first_rows = list(accumulate((len(ids) for ids in work.documents), initial=0))
    expected = {(number, point) for number in documents for point in case.points}
    store, errors = open_store(reference), []
    for number, point, states in contestant.read(case, documents, folder):
        if (number, point) not in expected:
            raise WrongStatesError(f"{point} of document {number} is there twice, or was not asked for")
        expected.remove((number, point))
        wanted = case.tokens_of(len(work.documents[number]))
        truth = store[point][first_rows[number] + wanted.start : first_rows[number] + wanted.stop]
        if states.shape != truth.shape:
            raise WrongStatesError(f"{point} of document {number} is {tuple(states.shape)}, not {tuple(truth.shape)}")
        errors.append(relative_errors(states, truth))
    if expected:
        number, point = min(expected, key=str)
        raise WrongStatesError(f"{point} of document {number} is missing, and {len(expected) - 1} others")
    every = torch.cat(errors)
    found, most = Errors(median=float(every.median()), largest=float(every.max())), TOLERANCES[work.dtype]
    if not (found.median <= most.median and found.largest <= most.largest):
        raise WrongStatesError(f"{case.title}, {work.dtype}: {found}, where {most} is the most")
    return found


def relative_errors(states: Tensor, reference: Tensor) -> Tensor:
    """[tokens, H] each, to [tokens]."""
    states, reference = states.double(), reference.double()
    return (states - reference).norm(dim=-1) / reference.norm(dim=-1)
