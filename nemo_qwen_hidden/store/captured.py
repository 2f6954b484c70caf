"""Captured steps: parts of a store that a training run has added, one for each step whose states it kept."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import Part
from nemo_qwen_hidden.store.fields import Fields
from nemo_qwen_hidden.store.format import Dtype
from nemo_qwen_hidden.store.shard import shard_bytes
from nemo_qwen_hidden.store.table import TOKEN_BYTES

PHASE = "phase"
SHARD_ROWS = 65536
_LISTED_BYTES, _LINE_BYTES = 450, 140  # of a shard or a part in the manifest, and of a document in its list; about


@dataclass(frozen=True, kw_only=True)
class CapturedStep:
    """What the ``data`` of a part says of the step that it holds.

    phase: ``train``, ``validation`` or ``probe``. step: optimizer steps that the weights had been given, from 0.
    samples: (first, count) of consecutive numbers, ascending; a document of the part is a sample, in this order.
    """

    phase: str
    step: int
    samples: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, part: Part, at: str) -> "CapturedStep | None":
        """The step in ``part``; None where that is not a captured step. at: the store, for errors.

        Raises:
            StoreError: its ``data`` names a phase and is not what it should be.
        """
        if PHASE not in part.data:
            return None
        fields = Fields(part.data, file=at, at="data")
        found = cls(phase=fields.text(PHASE), step=fields.integer("step"), samples=tuple(fields.pairs("samples")))
        if not found.phase:
            raise fields.error(PHASE, "must name a phase", found.phase)
        if sum(count for _, count in found.samples) != part.documents:
            raise fields.error("samples", f"must be {part.documents}, one a document", list(found.samples))
        return found

    def as_data(self) -> dict[str, Any]:
        """The ``data`` of its part (JSON values)."""
        return {PHASE: self.phase, "step": self.step, "samples": [list(each) for each in self.samples]}

    def __str__(self) -> str:
        return f"{self.phase}/{self.step}"


def captured_steps(parts: Iterable[Part], at: str) -> Iterator[tuple[int, CapturedStep]]:
    """Number and step of those parts that are captured steps.

    Raises:
        StoreError: two hold the same step; or as ``CapturedStep.of``.
    """
    seen: set[tuple[str, int]] = set()
    for number, part in enumerate(parts):
        step = CapturedStep.of(part, f"{at}: parts[{number}]")
        if step is None:
            continue
        if (step.phase, step.step) in seen:
            raise StoreError(f"{at}: parts[{number}]", "must be a step that no earlier part holds", str(step))
        seen.add((step.phase, step.step))
        yield number, step


def consecutive(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as (first, count) of consecutive ones."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return tuple(found)


def step_bytes(widths: Sequence[int], *, rows: int, documents: int, dtype: Dtype) -> int:
    """Bytes of one captured step in a store, the manifest's part included: some more or less, as names are long.

    Args:
        widths: numbers of a state, of each hook point. rows: that have states, which all have.
    """
    whole, rest = divmod(rows, SHARD_ROWS)
    sizes = [(whole, SHARD_ROWS), (1 if rest else 0, rest)]
    shards = sum(
        count * (shard_bytes(size, width=width, dtype=dtype, divisor=False) + _LISTED_BYTES)
        for width in widths
        for count, size in sizes
    )
    return shards + _LISTED_BYTES + TOKEN_BYTES * rows + (_LINE_BYTES + 8) * documents
