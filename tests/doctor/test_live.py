"""On ranks: the doctor finds nothing wrong with a healthy model in any layout, and names what is planted."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden.doctor.report import FAILED, OK, SKIPPED, Report
from nemo_qwen_hidden.topology import Topology
from tests.doctor.live_plants import healthy_reports, reports
from tests.support.models import Tiny, save_tiny

LENGTHS = (17, 40, 1, 29, 6, 33)
Start = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("live") / "model", Tiny(layers=4, groups=2, tied=True))


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randint(0, 383, (length,), generator=generator).tolist() for length in LENGTHS]


def planted(start: Start, folder: Path, topology: Topology, *plants: str, dtype: str = "fp32") -> dict[str, Report]:
    found = start(topology.world, reports, topology, folder, documents(), plants, dtype)
    return dict(zip(plants, found[0], strict=True))


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


ONE_RANK = {
    "rope_base": ("rope-base", "10000"),
    "positions_shifted": ("positions-shifted", "+2"),
    "no_qkv_bias": ("qkv-bias-missing", "Q, K, V"),
    "gate_and_up_swapped": ("gate-up-swapped", "gate and up"),
    "dropout_on_embeddings": ("dropout", "embed"),
    "attention_dropout": ("dropout", "z@0"),
    "norm_epsilon": ("norm-epsilon", "0.001"),
    "not_causal": ("not-causal", "after it"),
    "documents_leak": ("documents-leak", "longest first"),
    "qkv_in_plain_order": ("qkv-layout", "query group"),
    "layers_swapped": ("layers-out-of-order", ""),
}


def test_faults_of_the_model_are_named(start_ranks: Start, folder: Path) -> None:
    found = planted(start_ranks, folder, Topology(), "healthy", *ONE_RANK)
    assert found["healthy"].healthy and not found["healthy"].findings
    for name, (fault, word) in ONE_RANK.items():
        assert not found[name].healthy, name
        assert found[name].faults == (fault,), (name, found[name].findings)
        assert word in found[name].findings[0].says, found[name].findings


@pytest.mark.parametrize(
    ("topology", "faults"),
    [
        (
            Topology(tp=2),
            {
                "not_reduced": "not-summed",
                "other_norm_on_one_tp_rank": "replicas-differ",
                "vocabulary_swapped": "vocabulary",
                "gate_and_up_swapped": "gate-up-swapped",
            },
        ),
        (Topology(tp=2, sp=True), {"stripes_swapped": "tokens-permuted"}),
        (Topology(pp=2), {"stages_swapped": "layers-out-of-order"}),
        (Topology(dp=2), {"other_weights_on_one_replica": "replicas-differ"}),
        (Topology(cp=2), {"zigzag_not_undone": "tokens-permuted", "never_zigzagged": "not-zigzagged"}),
    ],
    ids=str,
)
def test_faults_of_a_layout_are_named(
    topology: Topology, faults: dict[str, str], start_ranks: Start, folder: Path
) -> None:
    found = planted(start_ranks, folder, topology, "healthy", *faults)
    assert found["healthy"].healthy and not found["healthy"].findings, found["healthy"]
    for name, fault in faults.items():
        assert not found[name].healthy, name
        assert found[name].faults[0] == fault, (name, found[name])


def layouts(world: int) -> list[Topology]:
    """Every product of the axes on ``world`` ranks that this model of 4 layers and 2 query groups allows."""
    found = []
    for tp, cp, pp, vp, dp, sp in product((1, 2), (1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4), (False, True)):
        fits = tp * cp * pp * dp == world and pp * vp <= 4
        if fits and not (sp and tp == 1) and not (vp > 1 and pp == 1):
            found.append(Topology(tp=tp, cp=cp, pp=pp, vp=vp, dp=dp, sp=sp))
    return found


@pytest.mark.parametrize(("world", "start"), [(2, 0), (4, 0), (4, 6), (4, 12)])
def test_nothing_is_wrong_with_a_healthy_model(world: int, start: int, start_ranks: Start, folder: Path) -> None:
    topologies = layouts(world)[start : start + 6]
    found = start_ranks(world, healthy_reports, topologies, folder, documents())[0]
    for topology, report in zip(topologies, found, strict=True):
        assert FAILED not in statuses(report).values() and not report.findings, (topology, report)
        assert statuses(report)["every hook point agrees with transformers"] == OK
        assert statuses(report)["dp replicas agree"] == (OK if topology.dp > 1 else SKIPPED)
        assert statuses(report)["tp replicas agree"] == (OK if topology.tp > 1 and not topology.sp else SKIPPED)


def test_that_is_every_layout() -> None:
    assert [len(layouts(world)) for world in (2, 4)] == [6, 16]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_coarse_dtypes_are_healthy(dtype: str, start_ranks: Start, folder: Path) -> None:
    report = planted(start_ranks, folder, Topology(tp=2), "healthy", dtype=dtype)["healthy"]
    assert report.healthy and not report.findings, report
    assert dtype in report.notes[0]
