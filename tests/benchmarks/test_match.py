"""All contestants of the benchmark on a tiny model: each gives our states, in processes of their own, since importing
TransformerLens changes how libraries log in a whole process."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.extraction import Match
from benchmarks.report import Result, plot, read, tables
from benchmarks.work import BF16, FP32, Work, cases
from benchmarks.worker import CLASSES, FLOOR
from tests.support.models import VOCAB, Tiny, save_tiny

MISSING = [name for name in ("transformer_lens", "nnsight", "matplotlib") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install '.[bench,lens]'"),
    pytest.mark.distributed,
]
TINY = Tiny(layers=4, groups=2, tied=True)
LENGTHS = (5, 33, 1, 12, 40, 7, 21, 3, 18, 9)


def documents() -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(tuple(torch.randint(0, VOCAB - 1, (n,), generator=generator).tolist()) for n in LENGTHS)


@pytest.mark.timeout(900)  # six programs start, each with a large library of its own
def test_every_contestant_gives_our_states(tmp_path: Path) -> None:
    """``Match.play`` raises where they are not; transformers is among those that are compared."""
    folder = save_tiny(tmp_path / "model", TINY, vocab_size=VOCAB)
    save_tokenizer(folder)
    work = Work(model=folder, dtype=FP32, documents=documents())
    match = Match(work, tuple(CLASSES), tmp_path)
    played = match.play(tuple(cases(TINY.layers).values()), rounds=1)
    for case in played:
        assert set(case.seconds) == {*CLASSES} - {FLOOR} | {f"{FLOOR} in {FP32}"}
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in case.seconds.values())
        assert set(case.errors) == {*CLASSES} - {FLOOR}
    result = Result(
        dtype=FP32,
        lengths=LENGTHS,
        equal=False,
        cases=played,
        choices=match.choices,
        machine="a machine",
        versions={"torch": torch.__version__},
        command="",
    )
    result.write(tmp_path / "result.json")
    again = read(tmp_path / "result.json")
    assert tables(again) == tables(result)
    plot([again, again], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def save_tokenizer(folder: Path) -> None:
    """One that TransformerLens can be given: nothing is tokenized with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "<unknown>": 1}, unk_token="<unknown>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_floors_of_a_dtype(dtype: str, tmp_path: Path) -> None:
    """The products in fp32 are always timed, those in the dtype once."""
    match = Match(Work(model=tmp_path, dtype=dtype, documents=()), (FLOOR,), tmp_path)
    assert {who: work.dtype for who, work in match.works.items()} == {
        f"{FLOOR} in {each}": each for each in {dtype, FP32}
    }
