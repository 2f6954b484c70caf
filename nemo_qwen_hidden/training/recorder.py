"""stand-in until the branch steps has it"""

from dataclasses import dataclass
from typing import Any

from nemo_qwen_hidden.capture.taps import LocalSlice

ROW_STRIDE = 2**32


@dataclass(frozen=True, kw_only=True)
class Sample:
    number: int
    id: str | None
    token_ids: Any


@dataclass(frozen=True, kw_only=True)
class StepStates:
    phase: str
    step: int
    samples: tuple[Sample, ...]
    slices: tuple[LocalSlice, ...]
