"""What every contestant is asked for: these documents' states, of this model in this dtype, into a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_qwen_hidden.hookpoint import FINAL_NORM, RESID_POST, HookPoint

BF16, FP32 = "bf16", "fp32"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Which states are wanted.

    residuals: indices of the decoder layers after which the residual stream is. normed: whether the state after the
    final norm is, too. last: of each document's last token alone. layers: decoder layers that have to run for it.
    """

    name: str
    title: str
    residuals: tuple[int, ...]
    normed: bool
    last: bool
    layers: int

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """In order of depth."""
        residuals = (HookPoint(RESID_POST, layer) for layer in self.residuals)
        return (*residuals, HookPoint(FINAL_NORM)) if self.normed else tuple(residuals)

    def tokens_of(self, length: int) -> range:
        """Positions whose states are wanted, of a document of ``length`` tokens."""
        return range(length - 1, length) if self.last else range(length)


def cases(num_layers: int) -> dict[str, Case]:
    """By name. "all" is what ``hidden_states[1:]`` of transformers holds, whose last entry is after the final norm."""
    middle, every = num_layers // 2 - 1, tuple(range(num_layers - 1))
    found = (
        Case(name="middle", title="one middle layer", residuals=(middle,), normed=False, last=False, layers=middle + 1),
        Case(name="all", title="all layers", residuals=every, normed=True, last=False, layers=num_layers),
        Case(name="last", title="last token only", residuals=(), normed=True, last=True, layers=num_layers),
    )
    return {case.name: case for case in found}


def probe(layers: int) -> Case:
    """The state after few layers, for choosing between settings."""
    return Case(name="probe", title="probe", residuals=(layers - 1,), normed=False, last=False, layers=layers)


@dataclass(frozen=True, kw_only=True)
class Work:
    """model: a Hugging Face folder. dtype: of weights, activations and stored states. documents: token ids of each.
    settings: of our own ``extract``, as on its command line."""

    model: Path
    dtype: str
    documents: tuple[tuple[int, ...], ...]
    settings: tuple[str, ...] = ()

    def of_dtype(self, dtype: str) -> "Work":
        return replace(self, dtype=dtype)

    def tokens(self, documents: Sequence[int]) -> int:
        return sum(len(self.documents[number]) for number in documents)


Choices = Mapping[str, str]
"""What a contestant has chosen for itself, in words."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """|states - reference| / |reference| (Euclidean norms over the hidden axis) over all tokens and hook points."""

    median: float
    largest: float
