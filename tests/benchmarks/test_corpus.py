"""The corpus: real files, spread over their lengths, the same each time."""

from pathlib import Path

import pytest

from benchmarks import corpus
from nemo_qwen_hidden import demo


@pytest.fixture(scope="module")
def model() -> Path:
    return demo.model_folder()


def test_ragged(model: Path) -> None:
    documents = corpus.ragged(model, tokens=20_000, longest=2048)
    assert documents == corpus.ragged(model, tokens=20_000, longest=2048)
    lengths = sorted(map(len, documents))
    assert 15_000 < sum(lengths) < 25_000
    assert lengths[0] < 200 and 1000 < lengths[-1] <= 2048
    assert len(set(documents)) == len(documents)


def test_equal(model: Path) -> None:
    documents = corpus.equal(model, tokens=1100, length=512)
    assert [len(ids) for ids in documents] == [512, 512]
