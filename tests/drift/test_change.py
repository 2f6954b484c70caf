"""Two steps against plain numpy formulas, and what must not change their likeness."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nemo_qwen_hidden.drift import probe_set
from nemo_qwen_hidden.drift.change import Change, change
from nemo_qwen_hidden.drift.probe_set import ProbeSet
from nemo_qwen_hidden.hookpoint import HookPoint
from tests.drift.helpers import make_steps

POINT = HookPoint("resid_post", 3)
ROWS, WIDTH = 42, 6


def compared(folder: Path, x: NDArray[np.floating], y: NDArray[np.floating], **options: float) -> Change:
    states = {0: {POINT: x.astype(np.float32)}, 5: {POINT: y.astype(np.float32)}}
    lengths = (len(x) - 1, 1)
    probe = ProbeSet(make_steps(folder, states, lengths=lengths, shard_rows=int(options.pop("shard_rows", 11))))
    return change(probe, str(POINT), step=5, reference=0, **options)


def random_pair(seed: int = 0, rows: int = ROWS, width: int = WIDTH) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """With a mean far from 0, as the residual stream has."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)) + 5 * rng.standard_normal(width)
    return x.astype(np.float32), (x + 0.5 * rng.standard_normal(x.shape)).astype(np.float32)


def gram_cka(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """By centred Gram matrices, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)): equation 3 of the paper."""
    centre = np.eye(len(x)) - 1 / len(x)
    gram_x, gram_y = (centre @ a.astype(np.float64) @ a.T.astype(np.float64) @ centre for a in (x, y))
    return float((gram_x * gram_y).sum() / np.sqrt((gram_x**2).sum() * (gram_y**2).sum()))


def test_every_measure_is_its_formula(tmp_path: Path) -> None:
    x, y = (a.astype(np.float64) for a in random_pair())
    found = compared(tmp_path / "store", x, y)
    x_norm, y_norm = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    cosine = np.einsum("nh,nh->n", x, y) / (x_norm * y_norm)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-6)
    assert [found.cosine_p05, found.cosine_p50, found.cosine_p95] == pytest.approx(
        np.quantile(cosine, [0.05, 0.5, 0.95]).tolist(), rel=1e-6
    )
    assert found.cka == found.cka_inliers == pytest.approx(gram_cka(x, y), rel=1e-6)
    assert found.change == found.change_inliers == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-6)
    assert found.norm == found.norm_inliers == pytest.approx(y_norm.mean(), rel=1e-6)
    assert found.outliers == found.nonfinite == 0


def test_a_step_against_itself(tmp_path: Path) -> None:
    x, _ = random_pair()
    found = compared(tmp_path / "store", x, x)
    assert [found.cosine, found.cka, found.change] == pytest.approx([1, 1, 0], abs=1e-12)


def test_cka_is_the_same_after_a_rotation_and_a_scaling_of_each_side(tmp_path: Path) -> None:
    x, y = random_pair()
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((WIDTH, WIDTH)))
    plain = compared(tmp_path / "plain", x, y)
    moved = compared(tmp_path / "moved", 7 * x @ rotation + 3, 0.1 * y)
    assert moved.cka == pytest.approx(plain.cka, rel=1e-5)
    assert abs(moved.cosine - plain.cosine) > 0.1  # which a rotation does change


def test_outliers_are_counted_and_left_out(tmp_path: Path) -> None:
    x, y = random_pair()
    x[0] *= 300  # the first token of all: a rule of norms before it would miss it
    y[:1], y[20] = x[:1], 50 * y[20]
    found = compared(tmp_path / "store", x, y)
    inliers = np.setdiff1d(np.arange(ROWS), [0, 20])
    assert found.outliers == pytest.approx(2 / ROWS)
    assert found.cka == pytest.approx(gram_cka(x, y), rel=1e-6)
    assert found.cka_inliers == pytest.approx(gram_cka(x[inliers], y[inliers]), rel=1e-5)
    assert found.norm_inliers == pytest.approx(np.linalg.norm(y[inliers], axis=1).mean(), rel=1e-6)
    assert found.norm > 5 * found.norm_inliers
    every = compared(tmp_path / "every", x, y, max_norm=1e6)
    assert every.cka_inliers == every.cka == pytest.approx(found.cka, rel=1e-12)


def test_nan_and_infinite_values_are_counted_and_left_out(tmp_path: Path) -> None:
    x, y = random_pair()
    x[3, 1], y[7, 2], y[8] = np.nan, np.inf, 0
    found = of_arrays(x, y)
    finite = np.setdiff1d(np.arange(ROWS), [3, 7])
    assert found.nonfinite == 2
    assert found.cka == pytest.approx(gram_cka(x[finite], y[finite]), rel=1e-6)
    nonzero = np.setdiff1d(finite, [8])
    cosine = np.einsum("nh,nh->n", x[nonzero], y[nonzero]).astype(np.float64)
    cosine /= np.linalg.norm(x[nonzero], axis=1) * np.linalg.norm(y[nonzero], axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-5)


def test_nothing_is_defined_where_nothing_is_finite_or_all_is_equal() -> None:
    x, y = random_pair()
    lost = of_arrays(x, np.full_like(y, np.nan))
    assert lost.nonfinite == ROWS
    assert all(np.isnan(value) for name, value in vars(lost).items() if name != "nonfinite")
    equal = of_arrays(np.full_like(x, 2), y)
    assert np.isnan(equal.cka) and not np.isnan(equal.cosine)


class Arrays(ProbeSet):
    """Two steps that no store holds; states come in blocks of ``block``."""

    def __init__(self, x: NDArray[np.float32], y: NDArray[np.float32], block: int = 10) -> None:
        self.states, self.steps, self.block = (x, y), (0, 1), block

    def check_alike(self, step: int, reference: int) -> None:
        pass

    def width(self, hook_point: str) -> int:
        return self.states[0].shape[1]

    def size(self, step: int) -> int:
        return len(self.states[0])

    def values(self, step: int, hook_point: str, states: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.states[step][states]

    def blocks(self, hook_point: str, states: NDArray[np.int64]):  # type: ignore[no-untyped-def]
        return (states[start : start + self.block] for start in range(0, len(states), self.block))


def of_arrays(x: NDArray[np.float32], y: NDArray[np.float32], **options: int) -> Change:
    probe = Arrays(x, y, options.pop("block", 10))
    return change(probe, str(POINT), step=1, reference=0, **options)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 9), st.integers(1, 70), st.integers(1, 2000))
def test_neither_blocks_nor_bands_change_a_measure(seed: int, rows: int, width: int, block: int, band: int) -> None:
    x, y = random_pair(seed, rows, width)
    x[rows // 2] *= 40
    whole = of_arrays(x, y, block=rows)
    cut = of_arrays(x, y, block=block, band_bytes=band)
    for name, value in vars(whole).items():
        assert getattr(cut, name) == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True)
    assert whole.cka == pytest.approx(gram_cka(x, y), rel=1e-4, nan_ok=True)
    assert np.isnan(whole.cka) or -1e-9 <= whole.cka <= 1 + 1e-9


def test_shards_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_set, "BLOCK_NUMBERS", 9 * WIDTH)
    x, y = random_pair()
    one, many = (compared(tmp_path / str(rows), x, y, shard_rows=rows) for rows in (100, 5))
    assert one == many
