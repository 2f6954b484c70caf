"""The linear probe against scikit-learn's, and its labels."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nemo_qwen_hidden.drift.labels import UNLABELLED, Labels, from_array, from_field, repeated_tokens
from nemo_qwen_hidden.drift.probe_accuracy import RIDGE, can_be_told, probe_accuracy, split
from nemo_qwen_hidden.drift.probe_set import ProbeSet
from nemo_qwen_hidden.errors import DataError
from tests.drift.helpers import LENGTHS, POINTS, make_steps, random_steps

ROWS = sum(LENGTHS)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ProbeSet:
    return ProbeSet(make_steps(tmp_path_factory.mktemp("probe") / "store", random_steps()))


def labels_of(of_states: NDArray[np.int64], classes: int = 3) -> Labels:
    documents = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    return Labels(name="any", classes=tuple("abc"[:classes]), of_states=of_states, documents=documents)


@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_right_as_often_as_scikit_learns(tmp_path: Path, classes: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(2)
    lengths, width = (40,) * 12, 9
    x = rng.standard_normal((sum(lengths), width)) * np.geomspace(0.1, 30, width) + 4
    x[:, 5] = 3.0  # equal in all states
    scores = ((x - 4) / np.geomspace(0.1, 30, width)) @ rng.standard_normal((width, classes))
    given = (scores + 2 * rng.standard_normal(scores.shape)).argmax(axis=1)
    store = make_steps(tmp_path / "store", {4: {POINTS[2]: x.astype(np.float32)}}, lengths=lengths, shard_rows=100)
    probe = ProbeSet(store)
    labels = from_array(probe, 4, given)
    parts = split(labels)
    scaler = preprocessing.StandardScaler().fit(x[parts.train])
    ridge = linear_model.RidgeClassifier(alpha=RIDGE * len(parts.train))
    ridge.fit(scaler.transform(x[parts.train]), given[parts.train])
    expected = ridge.score(scaler.transform(x[parts.held_out]), given[parts.held_out])
    found = probe_accuracy(probe, str(POINTS[2]), step=4, labels=labels)
    assert found.accuracy == pytest.approx(expected, abs=1e-12)
    most_frequent = np.bincount(given[parts.train]).argmax()
    assert found.baseline == pytest.approx((given[parts.held_out] == most_frequent).mean())
    assert found.accuracy > found.baseline + 0.1


def test_documents_are_in_one_part_alone_and_the_seed_decides(probe: ProbeSet) -> None:
    labels = labels_of(np.arange(ROWS) % 3)
    parts = split(labels)
    documents = [set(labels.documents[part].tolist()) for part in (parts.train, parts.held_out)]
    assert not documents[0] & documents[1] and len(documents[1]) == 2
    assert sorted([*parts.train, *parts.held_out]) == list(range(ROWS))
    again, other = split(labels), split(labels, seed=5)
    assert np.array_equal(again.train, parts.train) and not np.array_equal(other.train, parts.train)


def test_states_without_labels_count_for_nothing(probe: ProbeSet) -> None:
    labels = labels_of(np.where(np.arange(ROWS) < 14, UNLABELLED, np.arange(ROWS) % 3))
    parts = split(labels)
    assert min([*parts.train, *parts.held_out]) >= 14


def test_labels_that_cannot_be_told_are_refused(probe: ProbeSet) -> None:
    same = labels_of(np.zeros(ROWS, np.int64))
    one = labels_of(np.where(np.arange(ROWS) < 5, np.arange(ROWS) % 3, UNLABELLED))
    assert not can_be_told(same) and not can_be_told(one)
    with pytest.raises(DataError, match=r"two classes or more .*\['a'\]"):
        split(same)
    with pytest.raises(DataError, match=r"two documents or more.* 1 instead"):
        split(one)


def test_nan_in_the_states_is_nan_in_the_accuracy(tmp_path: Path) -> None:
    probe = ProbeSet(make_steps(tmp_path / "store", random_steps((0,))))
    labels = labels_of(np.arange(ROWS) % 3)
    parts = split(labels)
    for lost in (parts.train[0], parts.held_out[-1]):
        probe.values = lambda step, point, states, lost=lost: np.where(  # type: ignore[method-assign]
            (states == lost)[:, None], np.inf, np.ones((len(states), 6)) * states[:, None]
        ).astype(np.float32)
        found = probe_accuracy(probe, str(POINTS[0]), step=0, labels=labels)
        assert np.isnan(found.accuracy) and not np.isnan(found.baseline)


def test_a_token_is_repeated_where_it_stands_again_in_its_document(tmp_path: Path) -> None:
    ids = [1, 2, 1, 1, 3, 3, 1, 3]
    store = make_steps(tmp_path / "store", random_steps((0,), rows=8), token_ids=ids, lengths=(5, 3))
    labels = repeated_tokens(ProbeSet(store), 0)
    assert labels.of_states.tolist() == [0, 0, 1, 1, 0, 0, 0, 1]
    assert labels.classes == ("no", "yes")


def test_labels_of_documents_and_of_tokens_as_an_array(tmp_path: Path) -> None:
    kept = [0, 2]
    store = make_steps(tmp_path / "store", random_steps((0,), rows=4), lengths=(3, 4), kept=kept)
    probe = ProbeSet(store)
    of_documents = from_array(probe, 0, ["prose", "code"])
    assert of_documents.classes == ("code", "prose") and of_documents.of_states.tolist() == [1, 1, 0, 0]
    assert from_array(probe, 0, [5, 6, 7, 6, 5, 5, 5]).of_states.tolist() == [0, 2, 1, 0]
    for wrong in ([1, 2, 3], [0.5, 1.5], [[1, 2]]):
        with pytest.raises(DataError, match="one for each of 2 documents or 7 tokens"):
            from_array(probe, 0, wrong)


def test_labels_in_a_field(tmp_path: Path) -> None:
    store = make_steps(
        tmp_path / "store", random_steps((0,), rows=6), lengths=(2, 3, 1), names=("a", "b", "docs.jsonl#2")
    )
    probe, path = ProbeSet(store), tmp_path / "docs.jsonl"

    def write(*records: object) -> None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    write({"id": "a", "kind": "x"}, {"id": "b", "kind": ["y", None, True]}, {"text": "without an id"}, {"id": "more"})
    labels = from_field(probe, 0, "kind", str(path))
    assert labels.classes == ("True", "x", "y")
    assert labels.of_states.tolist() == [1, 1, 2, UNLABELLED, 0, UNLABELLED]
    with pytest.raises(DataError, match="must name a field of the records"):
        from_field(probe, 0, "sort", str(path))
    write({"id": "a", "kind": "x"})
    with pytest.raises(DataError, match=r"lacks one.*'b'"):
        from_field(probe, 0, "kind", str(path))
    write({"id": "a", "kind": "x"}, {"id": "b", "kind": "y"}, {}, {"id": "a", "kind": "y"})
    with pytest.raises(DataError, match=r"must be the same in all records with one id.*'a'"):
        from_field(probe, 0, "kind", str(path))
    write({"id": "a", "kind": 1.5}, {"id": "b"}, {})
    with pytest.raises(DataError, match="strings, integers or booleans"):
        from_field(probe, 0, "kind", str(path))
    write({"id": "a"}, {"id": "b", "kind": [1, 2]}, {})
    with pytest.raises(DataError, match="one for each of 3 tokens"):
        from_field(probe, 0, "kind", str(path))
