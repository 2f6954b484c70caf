"""Captured steps from several ranks into one store."""

from pathlib import Path

import pytest
import torch

from nemo_qwen_hidden.errors import RankError
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.store.growing import without_producers
from tests.support.recording import (
    LENGTHS,
    POINTS,
    Recording,
    another_step_on_rank_1,
    lost_slice,
    nan_on_rank_1,
    record,
    same_step_twice,
    token_ids,
    truth,
)

STEPS = (("train", 0), ("train", 1), ("validation", 1), ("train", 4))
TWO = [Topology(tp=2), Topology(tp=2, sp=True), Topology(pp=2), Topology(dp=2), Topology(cp=2)]
FOUR = [Topology(tp=2, pp=2), Topology(dp=2, pp=2), Topology(tp=2, dp=2, sp=True)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_layout_gives_the_bytes_of_one_rank(tmp_path: Path, start_ranks: Start) -> None:
    for kept in (None, 3):
        (alone,) = start_ranks(
            1, record, [Recording(path=tmp_path / f"one-{kept}", topology=Topology(), steps=STEPS, every=kept)]
        )
        assert alone == [(4, "")]
    asked = [Recording(path=tmp_path / str(topology), topology=topology, steps=STEPS) for topology in (*TWO, *FOUR)]
    asked += [Recording(path=tmp_path / "kept", topology=Topology(dp=2), steps=STEPS, every=3)]
    small = (("queue_bytes", 1), ("commit_secs", 0.0))
    asked += [Recording(path=tmp_path / "small", topology=Topology(dp=2), steps=STEPS, arguments=small)]
    for world in (2, 4):
        mine = [each for each in asked if each.topology.world == world]
        for results in (found := start_ranks(world, record, mine)):
            assert results == [(4, "")] * len(mine), found
    reference = files_of(tmp_path / "one-None")
    for each in asked:
        expected = files_of(tmp_path / "one-3") if each.every else reference
        assert files_of(each.path) == expected, each.path.name
    store = open_store(tmp_path / "one-None")
    assert verify(store.path, full=True).findings == () == verify(tmp_path / "kept", full=True).findings
    assert [(entry.phase, entry.step) for entry in store.steps] == list(STEPS)
    for phase, step in STEPS:
        view = store.at(step=step, phase=phase)
        numbers = range(len(LENGTHS) * step, len(LENGTHS) * (step + 1))
        assert [view.document(place).id for place in range(view.documents)] == [f"{phase}/{step}/{n}" for n in numbers]
        assert all((view.document(place).token_id == token_ids(n)).all() for place, n in enumerate(numbers))
        for point in POINTS:
            expected_states = torch.cat([truth(point, phase, step, number) for number in numbers])
            assert torch.equal(view[point][:], expected_states)


def test_a_failure_is_raised_on_all_ranks_at_the_same_call(tmp_path: Path, start_ranks: Start) -> None:
    topology = Topology(dp=2)
    alters = (nan_on_rank_1, same_step_twice, another_step_on_rank_1, lost_slice)
    asked = [Recording(path=tmp_path / each.__name__, topology=topology, alter=each) for each in alters]
    first, second = start_ranks(2, record, asked)
    assert [put for put, _ in first] == [put for put, _ in second]
    peer = "PeerError: another rank failed, and says why"
    assert [said for _, said in first][:1] == [peer]
    assert "must give finite values; embed row" in second[0][1]
    assert "must be one that the store" in first[1][1] and "but is 'train/1' instead" in first[1][1]
    assert second[1][1] == second[2][1] == peer
    assert "ranks have captured different steps at the same time: [('train', 1), ('validation', 1)]" in first[2][1]
    assert "CoverageError: not every state of a captured step was written exactly once" in first[3][1] == second[3][1]
    for each, steps in zip(asked[:3], (1, 2, 1), strict=True):  # what was there before is a store
        assert len(open_store(each.path).steps) == steps or each.path.exists()
    assert not asked[3].path.exists()


def test_ranks_that_see_another_folder_are_refused(tmp_path: Path, start_ranks: Start) -> None:
    results = start_ranks(2, apart, tmp_path)
    assert "PeerError" in results[0] and "must be a folder that every rank sees" in results[1]
    assert not (tmp_path / "0").exists()


def apart(rank, tmp_path):  # type: ignore[no-untyped-def]
    (outcome,) = record(rank, [Recording(path=tmp_path / str(rank.rank), topology=Topology(dp=2))])
    return outcome[1]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_run_that_was_killed_goes_on_with_each_step_once(tmp_path: Path, start_ranks: Start, dies: int) -> None:
    path, topology = tmp_path / "store", Topology(tp=2)
    steps = tuple(("train", step) for step in range(8))
    with pytest.raises(RankError):
        start_ranks(2, record, [Recording(path=path, topology=topology, steps=steps, ends=(dies, 6))])
    held = [entry.step for entry in open_store(path).steps]
    assert held == list(range(len(held)))
    resumed = Recording(path=path, topology=Topology(pp=2), steps=steps[3:], resume_at=3)
    whole = Recording(path=tmp_path / "whole", topology=topology, steps=steps)
    for results in start_ranks(2, record, [resumed, whole]):
        assert results == [(5, ""), (8, "")]
    one, other = open_store(path).manifest, open_store(tmp_path / "whole").manifest
    assert without_producers(one) == without_producers(other)
    assert verify(path, full=True).findings == ()
