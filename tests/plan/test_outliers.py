"""The running median against numpy's quantiles of all rows before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.config import TokenSettings
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import HookPoint, expand
from nemo_qwen_hidden.plan.outliers import DROPPED_BITS, NormOutliers, norm_point

NORMS = st.lists(
    st.floats(0, width=32) | st.sampled_from([0.0, 1.0, 1.0004, 3e38, 1e-45, float("inf"), float("nan")]), max_size=60
).map(lambda norms: np.array(norms, np.float32))


def rounded(norms: np.ndarray) -> np.ndarray:
    """Towards zero, to the bits that the median keeps."""
    return (norms.view(np.uint32) & np.uint32(2**32 - 2**DROPPED_BITS)).view(np.float32)


def plain(norms: np.ndarray, multiple: float) -> list[bool]:
    norms = np.where(np.isnan(norms), np.float32("inf"), norms)
    marked = [False] * len(norms[:1])
    for row in range(1, len(norms)):
        median = np.sort(rounded(norms[:row]))[(row - 1) // 2]
        marked.append(bool(np.float64(norms[row]) > multiple * np.float64(median)))
    return marked


@given(NORMS, st.sampled_from([0.5, 1.0, 3.0, 10.0]), st.lists(st.integers(0, 60), max_size=4))
def test_marks_are_their_definition_in_any_blocks(norms: np.ndarray, multiple: float, cuts: list[int]) -> None:
    outliers = NormOutliers(multiple)
    blocks = np.split(norms, sorted(min(cut, len(norms)) for cut in cuts))
    found = np.concatenate([outliers.mark(block) for block in blocks])
    assert found.dtype == np.bool_
    assert found.tolist() == plain(norms, multiple)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_many_rows_against_numpys_lower_median(spread: float) -> None:
    norms = np.random.default_rng(3).lognormal(2.0, spread, 3000).astype(np.float32)
    found = NormOutliers(2.0).mark(norms)
    for row in range(1, len(norms), 37):
        median = np.quantile(rounded(norms[:row]), 0.5, method="lower")
        assert found[row] == (norms[row] > 2.0 * float(median))
        exact = float(np.quantile(norms[:row], 0.5, method="lower"))
        assert 0 <= exact - median < exact * 2.0 ** (DROPPED_BITS - 23)


def test_two_far_clusters() -> None:
    """The median jumps between them at every row; the answer is the same."""
    norms = np.tile(np.array([1e-30, 1e30], np.float32), 200)
    assert NormOutliers(10.0).mark(norms).tolist() == plain(norms, 10.0)


def test_the_first_row_is_never_an_outlier_and_later_ones_outlive_it() -> None:
    norms = np.array([9000, 10, 11, 12, 9000, 10, 10], np.float32)
    assert np.flatnonzero(NormOutliers(10.0).mark(norms)).tolist() == [4]


def test_half_precision_norms_are_taken_too() -> None:
    norms = np.array([1, 2, 30], np.float16)
    assert NormOutliers(10.0).mark(norms).tolist() == [False, False, True]


POINTS = expand(["embed", "all", "attn_out@3", "final_norm"], num_layers=4)


@pytest.mark.parametrize(
    ("asked", "points", "found"),
    [
        (None, POINTS, "resid_post@3"),
        (None, expand(["embed", "final_norm", "q@1"], num_layers=4), "embed"),
        ("resid_post@1", POINTS, "resid_post@1"),
        ("resid_post@-2", POINTS, "resid_post@2"),
        ("attn_out@3", POINTS, "attn_out@3"),
        ("final_norm", POINTS, "final_norm"),
    ],
)
def test_whose_norms_count(asked: str | None, points: tuple[HookPoint, ...], found: str) -> None:
    tokens = TokenSettings(max_norm=3.0, max_norm_at=asked)
    assert str(norm_point(tokens, points, num_layers=4)) == found


@pytest.mark.parametrize(
    ("asked", "points", "setting"),
    [
        (None, expand(["final_norm", "attn_out@3", "z@3"], num_layers=4), "capture.hook_points"),
        ("resid_post@0:2", POINTS, "tokens.max_norm_at"),
        ("resid_post@9", POINTS, "tokens.max_norm_at"),
        ("resid_pre@1", POINTS, "tokens.max_norm_at"),
        ("z@1", expand(["z@1"], num_layers=4), "tokens.max_norm_at"),
        ("nowhere", POINTS, "tokens.max_norm_at"),
    ],
)
def test_norms_that_are_not_there(asked: str | None, points: tuple[HookPoint, ...], setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        norm_point(TokenSettings(max_norm=3.0, max_norm_at=asked), points, num_layers=4)
    assert refused.value.setting == setting
