"""One captured step while it goes on: what the model is fed with, and what was taken of it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from nemo_qwen_hidden.capture.taps import LocalSlice
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.topology import Place
from nemo_qwen_hidden.training.watch.batches import Batch, Lengths, Noted, Numbering
from nemo_qwen_hidden.training.watch.observer import Fed
from nemo_qwen_hidden.training.watch.step_states import ROW_STRIDE, Sample, StepStates


class StepInProgress:
    """Gathers what this rank has of one captured step.

    chooses: whether a sample is wanted. lengths: see ``Batch.of``. dtype: of what is kept; None: as it comes.
    """

    def __init__(
        self,
        phase: str,
        step: int,
        place: Place,
        *,
        chooses: Callable[[int], bool],
        lengths: Lengths | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.phase, self.step, self._place = phase, step, place
        self._chooses, self._lengths, self._dtype = chooses, lengths, dtype
        self._microbatches = 0
        self._samples: list[Sample] = []
        self._slices: list[LocalSlice] = []

    def fed(self, noted: Noted, numbering: Numbering) -> Callable[[int], Fed | None]:
        """What each microbatch of a step of NeMo's is, as soon as its batch has been noted; None where no sample of it
        is chosen. A validation has several steps. Raises as ``Batch.of`` does, and where the numbers of samples are not
        known."""
        found: dict[int, Fed | None] = {}
        first = self._microbatches
        self._microbatches += numbering.microbatches

        def fed(number: int) -> Fed | None:
            if number >= numbering.microbatches:
                return None  # one forward too many, which the observer refuses
            if number not in found:
                found[number] = self._feed(self._batch(noted, numbering, number), numbering, number, first + number)
            return found[number]

        return fed

    def _batch(self, noted: Noted, numbering: Numbering, number: int) -> Batch:
        """Of one microbatch: NeMo's sampler of whole batches gives all microbatches of a step at once."""
        cp = self._place.topology.cp
        if numbering.strided:
            return Batch.of(noted.batches[0], self._lengths, cp=cp).split(numbering.microbatches)[number]
        return Batch.of(noted.batches[number], self._lengths, cp=cp)

    def _feed(self, batch: Batch, numbering: Numbering, number: int, index: int) -> Fed | None:
        samples = numbering.numbers(number, self._place.dp)
        if len(samples) != len(batch.lengths):
            rule = f"must hold micro_batch_size ({len(samples)}) samples each, or their numbers are not known"
            raise ConfigError("batches", rule, len(batch.lengths))
        chosen = [place for place, sample in enumerate(samples) if self._chooses(sample)]
        for place in chosen:
            tokens = batch.token_ids[place, : batch.lengths[place]].numpy().astype(np.int32)
            self._samples.append(Sample(number=samples[place], id=None, token_ids=tokens))
        if not chosen:
            return None
        microbatch = batch.microbatch(index, [sample * ROW_STRIDE for sample in samples])
        return Fed(microbatch=microbatch, token_ids=batch.token_ids)

    def take(self, piece: LocalSlice) -> None:
        """A sink for slices."""
        self._slices.append(piece if self._dtype is None else replace(piece, values=piece.values.to(self._dtype)))

    def states(self) -> StepStates:
        """All that was taken."""
        samples = tuple(sorted(self._samples, key=lambda sample: sample.number))
        return StepStates(phase=self.phase, step=self.step, samples=samples, slices=tuple(self._slices))
