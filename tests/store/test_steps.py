"""A store that grows by one part for each captured step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nemo_qwen_hidden.errors import CoverageError, StoreError, StoreNotFoundError, UserError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.captured import CapturedStep
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.read.steps import UnknownStepError
from nemo_qwen_hidden.store.upkeep.export import export
from nemo_qwen_hidden.store.upkeep.merge import merge
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.store.write.step_files import States, StepFiles
from nemo_qwen_hidden.store.write.steps import GrowingStore
from tests.store.growing import (
    LENGTHS,
    SHARD_ROWS,
    capture,
    commit,
    description,
    documents,
    grow,
    values,
    without_producers,
)
from tests.store.helpers import POINTS, Run, begin, make_store

STEPS = [("train", 0), ("train", 1), ("validation", 2), ("train", 2)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_is_a_part_that_holds_what_was_written(tmp_path: Path, ranks: int) -> None:
    grow(tmp_path / "store", STEPS, ranks=ranks)
    assert verify(tmp_path / "store", full=True).findings == ()
    store = open_store(tmp_path / "store")
    assert [(entry.phase, entry.step) for entry in store.steps] == STEPS
    assert [part.data for part in store.manifest.parts[:2]] == [
        {"phase": "train", "step": 0, "samples": [[0, 4]]},
        {"phase": "train", "step": 1, "samples": [[10, 4]]},
    ]
    for number, (phase, step) in enumerate(STEPS):
        view, entry = store.at(step=step, phase=phase), store.steps[number]
        assert (view.rows, view.documents, view.states) == (sum(LENGTHS), len(LENGTHS), sum(LENGTHS))
        assert view.document(1).id == f"{phase}/{step}/{10 * step + 1}"
        assert np.array_equal(view.document(1).token_id, documents(step)[1].token_ids)
        assert np.array_equal(np.asarray(view.tokens.token_id), np.concatenate([d.token_ids for d in documents(step)]))
        for name in store.hook_points:
            truth = values(step, HookPoint.parse(name), view.states)
            assert torch.equal(view[name][:], truth) and torch.equal(store[name][entry.states], truth)
            assert torch.equal(view[name][3], truth[3]) and torch.equal(view[name][[5, 2, -1]], truth[[5, 2, -1]])
            shards = store.manifest.entry(HookPoint.parse(name)).shards[4 * number : 4 * number + 4]
            files = [load_file(tmp_path / "store" / shard.file)[name] for shard in shards if shard is not None]
            assert torch.equal(torch.cat(files), truth)


def test_ranks_make_the_same_bytes_as_one(tmp_path: Path) -> None:
    grow(tmp_path / "one", STEPS)
    grow(tmp_path / "three", STEPS, ranks=3)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    assert not {"unfinished.json", "journal"} & {path.name for path in (tmp_path / "one").iterdir()}


def test_some_tokens_alone_can_be_kept(tmp_path: Path) -> None:
    grow(tmp_path / "store", STEPS, kept=True, ranks=2)
    assert verify(tmp_path / "store", full=True).findings == ()
    view = open_store(tmp_path / "store").at(step=1, phase="train")
    assert (view.rows, view.states) == (17, 2 + 4 + 1 + 3)
    assert torch.equal(view["embed"][:], values(1, POINTS[0], view.states))
    assert view.tokens.kept_rows(0, 5).tolist() == [0, 2, 3]


def test_views_of_a_step_do_what_views_of_a_store_do(tmp_path: Path) -> None:
    what = description(stored_dtype="int8")
    grow(tmp_path / "store", STEPS, what=what)
    store = open_store(tmp_path / "store")
    view, entry = store.at(step=1, phase="train"), store.steps[1]
    statistics, stored = view["embed"].statistics(), view["embed"][:]
    assert torch.equal(stored, store["embed"][entry.states])
    assert statistics.rows == view.states and statistics.max_abs_state == int(stored.abs().amax(dim=1).argmax())
    np.testing.assert_allclose(statistics.mean, stored.double().mean(dim=0), atol=1e-9)
    assert torch.equal(view["embed"].standardized()[2:4], view["embed"].standardized()[:][2:4])
    assert view["embed"].float()[[True] * view.states].shape == (view.states, 6)
    error = view["embed"].error()
    assert error is not None and error.rows == view.states
    assert len(list(view["embed"])) == len(view["embed"]) == view.states
    assert "rows" in repr(view["embed"]) and "train step 1" in repr(view)
    with pytest.raises(IndexError):
        view["embed"][view.states]


def test_steps_that_are_not_there_are_named(tmp_path: Path) -> None:
    grow(tmp_path / "store", STEPS)
    store = open_store(tmp_path / "store")
    with pytest.raises(UnknownStepError, match=r"`phase` must be one that .* holds \(train, validation\), but is None"):
        store.at(step=2)
    with pytest.raises(UnknownStepError, match=r"captured step of phase 'train' .* \(3, 0 to 2\), but is 7 instead"):
        store.at(step=7, phase="train")
    made = make_store(tmp_path / "other")
    assert open_store(made.path).steps == ()
    with pytest.raises(UnknownStepError, match="none"):
        open_store(made.path).at(step=0)


def test_a_step_comes_once_and_in_order(tmp_path: Path) -> None:
    with GrowingStore(tmp_path / "store", description(), shard_rows=SHARD_ROWS) as store:
        files = StepFiles(tmp_path / "store", store.producers)
        capture(store, [files], 3)
        with pytest.raises(StoreError, match=r"does not hold yet, but is 'train/3' instead"):
            capture(store, [files], 3)
        with pytest.raises(StoreError, match=r"at least 3, .* but is 'train/2' instead"):
            capture(store, [files], 2)
        capture(store, [files], 3, "validation")
        files.sync()
        files.close()
    assert [str(entry.step) for entry in open_store(tmp_path / "store").steps] == ["3", "3"]


def test_what_ranks_have_not_written_once_is_no_step(tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match="2 of embed are missing, 1 were written twice"):
        _write_wrongly(tmp_path / "store")
    assert not (tmp_path / "store").exists()  # nothing was made that could be gone on with


def _write_wrongly(path: Path) -> None:
    from nemo_qwen_hidden.store.write.step_files import check_shares

    with GrowingStore(path, description(), shard_rows=SHARD_ROWS) as store:
        files = StepFiles(path, store.producers)
        begun = store.begin(CapturedStep(phase="train", step=0, samples=((0, 4),)), documents(0))
        runs = [Run(0, 10), Run(9, 6)]
        pieces = [States(point=point, runs=runs, values=torch.zeros(16, 6)) for point in begun.target.points]
        share = files.write(begun, pieces)
        files.close()
        check_shares(begun.target, [share])


def test_a_resumed_run_drops_what_it_does_again(tmp_path: Path) -> None:
    grow(tmp_path / "store", STEPS)
    grow(tmp_path / "store", [("train", 2), ("train", 3)], resume_at=2)
    grow(tmp_path / "whole", [("train", 0), ("train", 1), ("train", 2), ("train", 3)])
    resumed, whole = open_store(tmp_path / "store").manifest, open_store(tmp_path / "whole").manifest
    assert without_producers(resumed) == without_producers(whole)
    assert len(resumed.producers) == 2
    assert verify(tmp_path / "store", full=True).findings == ()
    assert files_of(tmp_path / "store").keys() == files_of(tmp_path / "whole").keys()
    assert grow(tmp_path / "store", [], resume_at=0).parts == ()
    with pytest.raises(StoreNotFoundError):
        open_store(tmp_path / "store")


@pytest.mark.parametrize("phases", [("validation",), ("validation", "train")])
def test_a_resumed_run_keeps_what_it_does_not_do_again(tmp_path: Path, phases: tuple[str, ...]) -> None:
    steps = [("train", 0), ("validation", 1), ("train", 1), ("validation", 2), ("train", 2), ("validation", 3)]
    grow(tmp_path / "store", steps)
    kept = grow(tmp_path / "store", [], resume_at=2, staying=phases)
    stays = 5 if "train" in phases else 4
    assert [(part.data["phase"], part.data["step"]) for part in kept.parts] == steps[:stays]
    grow(tmp_path / "store", steps[stays:], resume_at=3)
    grow(tmp_path / "whole", steps)
    resumed, whole = open_store(tmp_path / "store").manifest, open_store(tmp_path / "whole").manifest
    assert without_producers(resumed) == without_producers(whole)


def test_the_store_is_whole_while_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with GrowingStore(path, description(), shard_rows=SHARD_ROWS) as store:
        ranks = [StepFiles(path, store.producers) for _ in range(2)]
        capture(store, ranks, 0)
        commit(store, ranks)
        assert len(open_store(path).steps) == 1
        capture(store, ranks, 1)
        commit(store, ranks, publish=True)
        capture(store, ranks, 2)
        report = verify(path, full=True)
        assert report.findings == () and report.unfinished is not None
        assert len(open_store(path).steps) == 2
        with pytest.raises(StoreError, match="no other run is working on"):
            GrowingStore(path, description())
        for each in ranks:
            each.sync()
            each.close()
    assert len(open_store(path).steps) == 3


def test_other_stores_and_other_settings_are_refused(tmp_path: Path) -> None:
    grow(tmp_path / "store", STEPS)
    before = files_of(tmp_path / "store")
    with pytest.raises(UserError, match=r"`hidden_size` must be 6, as in the store at .*, but is 8 instead") as caught:
        grow(tmp_path / "store", [], what=description(hidden_size=8, stored_dtype="bf16", points=POINTS[:1]))
    assert "dtypes.stored" in str(caught.value) and "hook_points" in str(caught.value)
    made = make_store(tmp_path / "other")
    with pytest.raises(StoreError, match="a store of captured steps; an extraction's is there"):
        grow(made.path, [])
    begin(tmp_path / "unfinished")
    unfinished = files_of(tmp_path / "unfinished")
    with pytest.raises(StoreError, match="a store of captured steps; an extraction's is there"):
        grow(tmp_path / "unfinished", [])
    assert files_of(tmp_path / "store") == before
    assert files_of(tmp_path / "unfinished").keys() == unfinished.keys()


def test_a_run_that_begins_takes_no_store_of_another(tmp_path: Path) -> None:
    """A validation before the first step is its own."""
    grow(tmp_path / "store", [("validation", 0)], begins=True)
    grow(tmp_path / "store", [("train", 0), ("train", 1)], begins=True)
    before = files_of(tmp_path / "store")
    with pytest.raises(StoreError, match=r"must be a new folder where training begins; .* steps up to 1, of another"):
        grow(tmp_path / "store", [("train", 5)], begins=True)
    assert files_of(tmp_path / "store") == before


def test_upkeep_takes_such_stores(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from nemo_qwen_hidden.cli.main import main

    grow(tmp_path / "train", [("train", step) for step in range(12)])
    grow(tmp_path / "probe", [("probe", step) for step in (0, 4, 8)])
    done = merge([tmp_path / "train", tmp_path / "probe"], tmp_path / "both")
    assert verify(tmp_path / "both", full=True).findings == ()
    both = open_store(done.path)
    assert [str(e.phase) for e in both.steps].count("probe") == 3
    assert torch.equal(both.at(phase="probe", step=8)["embed"][:], values(8, POINTS[0], 17))
    export(tmp_path / "train", tmp_path / "numpy", to="npy")
    exported = np.load(next((tmp_path / "numpy").glob("embed*.npy")))
    assert np.array_equal(exported[17 * 5 : 17 * 6], values(5, POINTS[0], 17).numpy())
    assert main(["inspect", str(tmp_path / "both")]) == 0
    shown = "".join(capfd.readouterr())
    assert "train" in shown and "0 to 11" in shown and "probe" in shown
    assert main(["inspect", str(tmp_path / "both"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["steps"][0] == {
        "phase": "train",
        "step": 0,
        "samples": [[0, 4]],
        "part": 0,
        "rows": 17,
        "documents": 4,
    }


def test_a_damaged_record_of_a_step_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    grow(tmp_path / "store", STEPS)
    manifest = open_store(tmp_path / "store").manifest
    for data, what in (
        ({"phase": "train", "step": -1, "samples": []}, "data.step"),
        ({"phase": "train", "step": 0, "samples": [[0, 3]]}, "data.samples"),
        ({"phase": "train", "step": 1, "samples": [[0, 4]]}, "no earlier part holds"),
    ):
        part = replace(manifest.parts[0], data=data)
        changed = replace(manifest, parts=(part, *manifest.parts[1:]))
        (tmp_path / "store" / "manifest.json").write_bytes(changed.to_json())
        with pytest.raises(StoreError, match=what):
            open_store(tmp_path / "store").at(step=0)
