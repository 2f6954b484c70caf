"""Who gets what: ``rank0`` is in test_layouts; here ``none`` and ``all``."""

from pathlib import Path

import numpy as np

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import TINY, Tiny, ragged_batch
from tests.support.ranks import local_and_all


def test_each_rank_holds_its_own_rows_and_all_ranks_can_have_the_whole(
    tiny_folders: dict[Tiny, Path], start_ranks: Start
) -> None:
    batch, tiny = ragged_batch(), TINY[1]
    topology = Topology(tp=2, pp=2, sp=True)
    ranks = start_ranks(topology.world, local_and_all, topology, tiny_folders[tiny], batch)
    whole = ranks[0][1]
    held_rows = dict.fromkeys(whole, 0)
    for local, everything in ranks:
        assert everything.keys() == whole.keys()
        assert all(np.array_equal(everything[point], whole[point]) for point in whole)
        for point, (values, sequence, position) in local.items():
            assert np.array_equal(values, whole[point][sequence, position])
            held_rows[point] += len(values)
    assert set(held_rows.values()) == {sum(batch.lengths)}  # each row is held once
    assert set(ranks[0][0]) == {HookPoint("embed"), HookPoint("resid_post", 0), HookPoint("resid_post", 1)}
    assert set(ranks[3][0]) == {HookPoint("resid_post", 2), HookPoint("final_norm")}
