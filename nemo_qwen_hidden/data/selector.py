"""Which tokens of each document are kept, as documents come."""

import hashlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_qwen_hidden.config import TokenSettings
from nemo_qwen_hidden.data.tokenize import TokenizedDocument
from nemo_qwen_hidden.data.tokenizer import Tokenizer
from nemo_qwen_hidden.plan.selection import (
    Positions,
    RowSample,
    filters_nothing,
    keeps_everything,
    kept_of,
    pooled_last,
    samples_all,
)


class Selector:
    """Chooses tokens as ``settings`` say, but for ``max_norm``, for which states are needed.

    Each document goes through ``kept`` once, in order. Where ``samples_all``, what is drawn is known after the last
    one: what ``kept`` gave is only what is drawn from, and has to go through ``drawn``.

    Args:
        tokenizer: gives the model's tokenizer; called only where special tokens are left out.
    """

    def __init__(self, settings: TokenSettings, tokenizer: Callable[[], Tokenizer]) -> None:
        self._settings = settings
        self._special = None if settings.special else np.array(sorted(tokenizer().special_tokens.values()), np.int32)
        self._sample = RowSample(settings.sample or 0, settings.seed) if samples_all(settings) else None
        self._rows = 0

    @property
    def samples_all(self) -> bool:
        """Whether tokens are drawn of the whole data, so that ``drawn`` has the last word."""
        return self._sample is not None

    def kept(self, document: TokenizedDocument) -> Positions | None:
        """Positions, int64 and ascending, that are kept of the next document; None where all of them are."""
        length, first_row = len(document.token_ids), self._rows
        self._rows += length
        positions = self._positions(document)
        if self._sample is not None:
            self._sample.offer(first_row + _listed(positions, length))
        return positions

    def drawn(self, first_row: int, length: int, positions: Positions | None) -> Positions | None:
        """What is kept of a document in the end.

        Args:
            first_row: its first row, counted from the first document that was given to ``kept``.
            positions: what ``kept`` gave for it.
        """
        if self._sample is None:
            return positions
        listed = _listed(positions, length)
        found = pooled_last(self._settings, listed[self._sample.drawn(first_row + listed)])
        return None if len(found) == length else found

    def as_dict(self) -> dict[str, Any] | None:
        """What was chosen, for a manifest: the settings that differ from keeping everything; None where none does."""
        return choice_of(self._settings)

    def _positions(self, document: TokenizedDocument) -> Positions | None:
        settings, length = self._settings, len(document.token_ids)
        samples = settings.sample is not None and not samples_all(settings)
        if filters_nothing(settings) and settings.pool != "last" and not samples:
            return None
        special = None if self._special is None else np.isin(document.token_ids, self._special)
        positions = kept_of(settings, length, document=key_of(document.id), mask=document.mask, special=special)
        return None if len(positions) == length else positions


def choice_of(settings: TokenSettings) -> dict[str, Any] | None:
    """The settings that differ from keeping everything, as JSON; None where all is kept."""
    if keeps_everything(settings):
        return None
    default = TokenSettings()
    chosen: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        seeds = field.name == "seed" and settings.sample is not None
        if seeds or (field.name != "seed" and value != getattr(default, field.name)):
            chosen[field.name] = list(value) if isinstance(value, tuple) else value
    return chosen


def key_of(document_id: str) -> int:
    """The integer that stands for a document where tokens are drawn of it: the first 8 bytes, little-endian, of the
    SHA-256 of its id. So the draw does not depend on what other documents there are."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "little")


def _listed(positions: Positions | None, length: int) -> npt.NDArray[np.int64]:
    return np.arange(length, dtype=np.int64) if positions is None else positions
