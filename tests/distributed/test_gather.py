"""Who gets what: ``rank0`` is in test_layouts; here ``none`` and ``all``."""

from pathlib import Path

import numpy as np
import pytest

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import TINY, Tiny, ragged_batch
from tests.support.ranks import gathered, local_and_all


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


@pytest.mark.parametrize("topology", [Topology(pp=2), Topology(tp=2)], ids=str)
def test_means_come_from_other_ranks_in_their_own_dtype(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], topology: Topology
) -> None:
    """They are sums in fp32, whatever the compute dtype."""
    folder, batch, options = tiny_folders[TINY[0]], ragged_batch(), [{"pool": "mean"}]
    ((alone,),) = start_ranks(1, gathered, Topology(), [folder], batch, options, "bf16")[0]
    ((found,),) = start_ranks(topology.world, gathered, topology, [folder], batch, options, "bf16")[0]
    for point, states in alone.items():
        np.testing.assert_allclose(found[point], states, rtol=0.05, atol=0.05 * float(np.abs(states).max()))
