"""All steps of a store as values, JSON, tables and pictures."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_qwen_hidden.drift.change import change
from nemo_qwen_hidden.drift.labels import repeated_tokens
from nemo_qwen_hidden.drift.measures import measure
from nemo_qwen_hidden.drift.pictures import FORMATS, draw
from nemo_qwen_hidden.drift.probe_accuracy import probe_accuracy
from nemo_qwen_hidden.drift.probe_set import ProbeSet
from nemo_qwen_hidden.drift.report import MEASURES, Report, drift, evenly, facts, notes, tables
from nemo_qwen_hidden.store.fields import to_json
from nemo_qwen_hidden.store.read.reader import Store
from tests.drift.helpers import POINTS, make_steps, random_steps

STEPS = (0, 5, 10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_steps(tmp_path_factory.mktemp("drift") / "store", random_steps(STEPS))


@pytest.fixture(scope="module")
def report(store: Store) -> Report:
    probe = ProbeSet(store)
    return drift(probe, labels=repeated_tokens(probe, 0))


def test_a_report_holds_every_comparison(store: Store, report: Report) -> None:
    probe = ProbeSet(store)
    assert (report.steps, report.reference) == (STEPS, 0)
    assert set(report.measures) == set(MEASURES) and report.probe is not None
    labels = repeated_tokens(probe, 0)
    for point in map(str, POINTS):
        for number, step in enumerate(STEPS):
            expected = change(probe, point, step=step, reference=0)
            assert {name: report.measures[name][point][number] for name in MEASURES} == vars(expected)
            read = probe_accuracy(probe, point, step=step, labels=labels)
            assert (report.probe.accuracy[point][number], report.probe.baseline) == (read.accuracy, read.baseline)
    assert report.measures["cosine"]["embed"][0] == pytest.approx(1)
    assert sorted(report.measures["cosine"]["embed"], reverse=True) == list(report.measures["cosine"]["embed"])


def test_flat_names_for_a_logger(store: Store, report: Report) -> None:
    flat = measure(store, step=10, labels=repeated_tokens(ProbeSet(store), 0))
    assert flat["drift/cosine/resid_post@3"] == report.measures["cosine"]["resid_post@3"][2]
    assert flat["drift/accuracy/embed"] == report.probe.accuracy["embed"][2]  # type: ignore[union-attr]
    assert len(flat) == len(POINTS) * (len(MEASURES) + 2)
    assert set(measure(store, step=10, reference=5, hook_points=["embed"])) == {f"drift/{n}/embed" for n in MEASURES}


def test_json_says_null_where_nothing_is_defined(tmp_path: Path) -> None:
    states = random_steps((0, 5))
    states[5][POINTS[0]][:] = 0
    found = drift(ProbeSet(make_steps(tmp_path / "store", states))).as_dict()
    assert json.loads(to_json(found))["measures"]["cosine"]["embed"] == [pytest.approx(1), None]


def test_tables_and_facts(report: Report) -> None:
    first, *rest = tables(report)
    assert first.title == "mean cosine to step 0" and first.header == ("step", "0", "5", "10")
    assert [row[0] for row in first.rows] == list(report.hook_points) and first.rows[0][1] == "1.000"
    assert [table.title.split()[0] for table in rest] == ["linear", "relative", "mean", "accuracy"]
    assert dict(facts(report))["outliers"] == "norms above 10 times the median of a step: none"
    assert ["are few" in note for note in notes(report)] == [True]
    assert "compared with itself" in notes(replace(report, steps=report.steps[:1]))[0]


def test_outliers_have_a_table_of_their_own(tmp_path: Path) -> None:
    states = random_steps((0, 5))
    states[0][POINTS[1]][4] *= 100
    found = drift(ProbeSet(make_steps(tmp_path / "store", states)))
    titles = [table.title for table in tables(found)]
    assert titles[1:3] == ["linear CKA to step 0, without outliers", "linear CKA to step 0, all states"]
    assert dict(facts(found))["outliers"].endswith(": up to 2.4 % of the states")


def test_evenly_has_both_ends() -> None:
    assert evenly(range(3), 7) == [0, 1, 2]
    assert evenly(range(100), 7) == [0, 16, 33, 50, 66, 82, 99]


@pytest.mark.parametrize("form", FORMATS)
def test_pictures_are_the_same_bytes_each_time(report: Report, tmp_path: Path, form: str) -> None:
    pytest.importorskip("matplotlib")
    digests = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        written = draw(report, folder, form=form)
        assert [path.name for path in written] == [f"{what}.{form}" for what in ("similarity", "norms", "accuracy")]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in written])
    assert digests[0] == digests[1]


def test_pictures_say_what_they_show_and_cover_nothing(report: Report) -> None:
    pytest.importorskip("matplotlib")
    from nemo_qwen_hidden.drift import pictures

    for picture in (pictures.similarity, pictures.norms, pictures.accuracy):
        figure = picture(report)
        panels = [axes for axes in figure.axes if axes.get_title()]
        assert panels and all(axes.get_xlabel() == "step" for axes in panels)
        assert all(axes.get_legend() is None for axes in figure.axes)  # legends stand outside of the panels
    cosine = pictures.similarity(report).axes[0].images[0].get_array()
    np.testing.assert_allclose(cosine, [report.measures["cosine"][point] for point in report.hook_points])
    lines = pictures.accuracy(report).axes[0].lines
    assert [list(line.get_ydata()) for line in lines[:3]] == [list(v) for v in report.probe.accuracy.values()]  # type: ignore[union-attr]
    assert set(lines[3].get_ydata()) == {report.probe.baseline}  # type: ignore[union-attr]


def test_many_steps_and_hook_points_and_undefined_values_can_be_drawn(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dataclasses import replace

    steps, points = tuple(range(0, 6000, 100)), tuple(f"resid_post@{layer}" for layer in range(80))
    rng = np.random.default_rng(0)
    values = {point: (float("nan"), *rng.random(len(steps) - 1).tolist()) for point in points}
    large = replace(report, steps=steps, hook_points=points, measures=dict.fromkeys(MEASURES, values), probe=None)
    assert len(draw(large, tmp_path)) == 2
