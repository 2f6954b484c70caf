"""Losses on states against autograd through transformers, in every layout."""

from pathlib import Path

import pytest

from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.training import state_losses
from tests.training.state_losses import Case, Found, Truth

BOUND = 1e-5
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "uniform1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block1": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}
TWO_RANKS = {
    "tp2": Topology(tp=2),
    "tp2_sp": Topology(tp=2, sp=True),
    "pp2": Topology(pp=2),
    "pp2_vp2": Topology(pp=2, vp=2),
    "cp2": Topology(cp=2),
    "dp2": Topology(dp=2),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    folder = tmp_path_factory.mktemp("losses")
    state_losses.prepare(folder)
    truth = state_losses.by_transformers(folder)
    state_losses.save_gradients(folder / "gradients", truth)
    return folder, truth


def check(case: Case, ranks: list[Found], truth: Truth) -> None:
    seen = set()
    for found in ranks:
        assert not found.error
        worst = max(found.errors, key=found.errors.__getitem__)
        assert found.errors[worst] <= BOUND, (case, worst, found.errors[worst])
        assert found.values == pytest.approx(truth.values, rel=BOUND)
        seen |= {name.partition("state_heads.")[2].split(".")[0] for name in found.errors if "state_heads" in name}
    assert seen == {"early", "probe", "narrow", "detached", "value", "class", "medusa"}


def test_one_rank(start_ranks: Start, prepared: tuple[Path, Truth]) -> None:
    folder, truth = prepared
    cases = [Case(topology=Topology(), settings=recompute) for recompute in RECOMPUTE.values()]
    for case, *ranks in zip(cases, *start_ranks(1, state_losses.run, folder, cases), strict=True):
        check(case, ranks, truth)


def test_two_ranks(start_ranks: Start, prepared: tuple[Path, Truth]) -> None:
    folder, truth = prepared
    cases = [Case(topology=topology, settings=how) for topology in TWO_RANKS.values() for how in RECOMPUTE.values()]
    for case, *ranks in zip(cases, *start_ranks(2, state_losses.run, folder, cases), strict=True):
        check(case, ranks, truth)


def test_four_ranks(start_ranks: Start, prepared: tuple[Path, Truth]) -> None:
    folder, truth = prepared
    cases = [Case(topology=Topology(tp=2, pp=2), settings=how) for how in RECOMPUTE.values()]
    for case, *ranks in zip(cases, *start_ranks(4, state_losses.run, folder, cases), strict=True):
        check(case, ranks, truth)
