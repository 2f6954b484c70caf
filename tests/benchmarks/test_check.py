"""What makes a contestant's states wrong."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.check import WrongStatesError, check
from benchmarks.rivals.rival import Contestant, Found
from benchmarks.work import FP32, Case, Work
from nemo_qwen_hidden import open_store
from nemo_qwen_hidden.hookpoint import HookPoint
from tests.store.helpers import make_store

LENGTHS = (3, 7, 1, 12)
ALL = range(len(LENGTHS))
CASE = Case(name="all", title="all layers", residuals=(0, 3), normed=True, last=False, layers=4)
LAST = Case(name="last", title="last token only", residuals=(), normed=True, last=True, layers=4)


class Copies(Contestant):
    """Reads a store's own states, with something done to some of them."""

    def __init__(self, changed: str = "") -> None:
        super().__init__(Work(model=Path(), dtype=FP32, documents=tuple((0,) * length for length in LENGTHS)))
        self.changed = changed

    def run(self, case: Case, documents: Sequence[int], folder: Path) -> float:
        raise NotImplementedError

    def read(self, case: Case, documents: Sequence[int], folder: Path) -> Found:
        store = open_store(folder)
        for document in documents:
            for point in case.points:
                wanted = case.tokens_of(LENGTHS[document])
                first = sum(LENGTHS[:document])
                states = store[point][first + wanted.start : first + wanted.stop]
                hit = (document, point) == (documents[-1], HookPoint("final_norm"))
                if hit and self.changed == "missing":
                    continue
                if hit and self.changed == "short":
                    states = states[1:]
                if hit and self.changed == "value":
                    states[-1, 0] += 1e-2 * states[-1].norm()
                if hit and self.changed == "nan":
                    states[-1, 0] = torch.nan
                yield document, point, states
                if hit and self.changed == "twice":
                    yield document, point, states


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("made") / "store", lengths=LENGTHS).path


@pytest.mark.parametrize("case", [CASE, LAST], ids=lambda case: case.name)
@pytest.mark.parametrize("documents", [ALL, ALL[::2]], ids=["all", "some"])
def test_equal_states(store: Path, case: Case, documents: range) -> None:
    errors = check(Copies(), case, documents, store, store)
    assert (errors.median, errors.largest) == (0, 0)


@pytest.mark.parametrize("case", [CASE, LAST], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("missing", "final_norm of document 3 is missing"),
        ("short", r"final_norm of document 3 is \(\d+, \d+\), not"),
        ("value", "is the most"),
        ("nan", "is the most"),
        ("twice", "final_norm of document 3 is there twice"),
    ],
)
def test_wrong_states(store: Path, case: Case, changed: str, words: str) -> None:
    with pytest.raises(WrongStatesError, match=words):
        check(Copies(changed), case, ALL, store, store)
