"""The usual script: the causal model with ``output_hidden_states``, padded batches in the order of the corpus,
``torch.save`` of each batch's states as they come, padding and all."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.rivals.rival import DTYPES, Batch, Contestant, Found, batch_of
from benchmarks.work import Case, Choices, Work
from nemo_qwen_hidden.hookpoint import RESID_POST

DOCUMENTS_OF_A_BATCH = 8


class Script(Contestant):
    """Computes all layers and the logits, whatever is wanted."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.model = AutoModelForCausalLM.from_pretrained(work.model, dtype=DTYPES[work.dtype]).eval()

    def choose(self, folder: Path) -> Choices:
        return {"batch": f"{DOCUMENTS_OF_A_BATCH} documents"}

    def run(self, case: Case, documents: Sequence[int], folder: Path) -> float:
        folder.mkdir()
        start = time.perf_counter()
        for number, batch in enumerate(self._batches(documents)):
            mask = torch.arange(batch.ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
            with torch.no_grad():
                states = self.model(batch.ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
            torch.save([self._wanted(case, batch, state) for state in _of(case, states)], folder / f"{number}.pt")
        return time.perf_counter() - start

    def read(self, case: Case, documents: Sequence[int], folder: Path) -> Found:
        for number, batch in enumerate(self._batches(documents)):
            saved = torch.load(folder / f"{number}.pt", weights_only=True)
            for point, states in zip(case.points, saved, strict=True):
                for document, state, length in zip(batch.documents, states, batch.lengths, strict=True):
                    yield document, point, state[None] if case.last else state[:length]

    def _batches(self, documents: Sequence[int]) -> Iterator[Batch]:
        for start in range(0, len(documents), DOCUMENTS_OF_A_BATCH):
            yield batch_of(self.work, documents[start : start + DOCUMENTS_OF_A_BATCH])

    def _wanted(self, case: Case, batch: Batch, states: Tensor) -> Tensor:
        return states[batch.last] if case.last else states


def _of(case: Case, states: Sequence[Tensor]) -> list[Tensor]:
    """Of ``hidden_states``: [0] are the embeddings, [-1] is after the final norm."""
    return [states[point.layer + 1] if point.site == RESID_POST else states[-1] for point in case.points]
