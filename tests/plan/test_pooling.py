"""Weights against numpy's averages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.plan.pooling import check_whole, pooled_row, weights

POSITIONS = st.sets(st.integers(0, 4000), min_size=1, max_size=60).map(lambda found: np.array(sorted(found), np.int64))


@given(POSITIONS)
def test_weights_give_numpys_averages(positions: np.ndarray) -> None:
    states = np.random.default_rng(0).standard_normal((len(positions), 5))
    np.testing.assert_allclose(weights("mean", positions) @ states, states.mean(0), rtol=1e-12, atol=1e-12)
    weighted = np.average(states, axis=0, weights=positions + 1)
    np.testing.assert_allclose(weights("weighted_mean", positions) @ states, weighted, rtol=1e-12, atol=1e-12)
    for pool in ("mean", "weighted_mean"):
        assert weights(pool, positions).dtype == np.float64
        assert abs(weights(pool, positions).sum() - 1) < 1e-12


def test_sgpts_example() -> None:
    """w_i = i / sum(i) over a whole document: 1/6, 2/6, 3/6 of three tokens."""
    np.testing.assert_allclose(weights("weighted_mean", np.arange(3)), [1 / 6, 2 / 6, 3 / 6], rtol=1e-15)


def test_the_same_whatever_blocks_the_positions_are_summed_in() -> None:
    """Ranks hold parts of a document: their shares of the weights are those of the whole."""
    positions = np.arange(3, 90, 4)
    whole = weights("weighted_mean", positions)
    assert whole[:7].tolist() + whole[7:].tolist() == ((positions + 1) / (positions + 1).sum()).tolist()


def test_a_vector_stands_at_the_last_row_of_its_document() -> None:
    assert pooled_row(100, 7) == 106
    assert pooled_row(0, 1) == 0


@pytest.mark.parametrize("pool", ["none", "last"])
def test_what_has_no_weights(pool: str) -> None:
    with pytest.raises(ValueError, match="must be one of mean, weighted_mean"):
        weights(pool, np.arange(3))
    with pytest.raises(ValueError, match="over at least one position"):
        weights("mean", np.arange(0))


@pytest.mark.parametrize("pool", ["mean", "weighted_mean"])
def test_documents_in_windows_are_refused(pool: str) -> None:
    check_whole(pool, cut_documents=0, max_tokens=512)
    with pytest.raises(ConfigError) as refused:
        check_whole(pool, cut_documents=1200, max_tokens=2048)
    assert str(refused.value) == (
        "`tokens.pool` must be none or last where documents are cut into windows (1,200 documents are longer than the "
        f"2,048 tokens of `data.max_tokens`), but is '{pool}' instead."
    )
    with pytest.raises(ConfigError, match="1 document is longer"):
        check_whole(pool, cut_documents=1, max_tokens=2048)


@pytest.mark.parametrize("pool", ["none", "last"])
def test_what_needs_no_whole_document(pool: str) -> None:
    check_whole(pool, cut_documents=5, max_tokens=512)
