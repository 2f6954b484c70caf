"""Which parts of a store are captured steps of a probe set, and that their tokens are the same."""

from pathlib import Path

import numpy as np
import pytest

from nemo_qwen_hidden.drift.probe_set import ProbeSet
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.read.reader import open_store
from tests.drift.helpers import LENGTHS, POINTS, make_steps, random_steps
from tests.store.helpers import make_store


def test_the_states_of_each_step(tmp_path: Path) -> None:
    states = random_steps()
    probe = ProbeSet(make_steps(tmp_path / "store", states))
    assert probe.steps == (0, 5, 10)
    assert (probe.size(5), probe.documents(5)) == (sum(LENGTHS), len(LENGTHS))
    assert probe.document_ids(10) == [f"doc-{number}" for number in range(len(LENGTHS))]
    for step, by_point in states.items():
        for point, values in by_point.items():
            for chosen in (np.arange(len(values)), np.array([3, 4, 5]), np.array([1, 30, 31])):
                np.testing.assert_array_equal(probe.values(step, str(point), chosen), values[chosen])


def test_other_phases_are_passed_over(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="captured steps of a probe set"):
        ProbeSet(make_steps(tmp_path / "train", random_steps(), phase="train"))
    with pytest.raises(StoreError, match="captured steps of a probe set"):
        ProbeSet(open_store(make_store(tmp_path / "plain").path))


def test_a_step_that_was_not_captured_is_refused_with_those_that_were(tmp_path: Path) -> None:
    probe = ProbeSet(make_steps(tmp_path / "store", random_steps()))
    with pytest.raises(StoreError, match=r"\(3, 0 to 10\), but is 7"):
        probe.check_alike(7, 0)


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    ids = np.arange(sum(LENGTHS))
    other = np.where(ids == 17, 99, ids)
    store = make_steps(tmp_path / "store", random_steps(), token_ids={0: ids, 5: other, 10: ids})
    probe = ProbeSet(store)
    probe.check_alike(10, 0)
    with pytest.raises(StoreError, match="the same tokens at step 5 as at step 0"):
        probe.check_alike(5, 0)


def test_states_of_some_rows_alone_are_known_by_their_rows(tmp_path: Path) -> None:
    kept = [1, 3, 4]
    rows = [first + k for first, n in zip(np.cumsum((0, *LENGTHS)), LENGTHS, strict=False) for k in kept if k < n]
    probe = ProbeSet(make_steps(tmp_path / "store", random_steps((0, 5), rows=len(rows)), kept=kept))
    assert probe.rows_of_states(5).tolist() == rows
    probe.check_alike(5, 0)
    assert probe.hook_points() == tuple(map(str, POINTS))
