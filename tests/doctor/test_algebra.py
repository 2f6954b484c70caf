"""Each identity holds for states that torch has added up, in each dtype, and fails at the place that was changed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nemo_qwen_hidden.doctor import algebra
from nemo_qwen_hidden.doctor.observation import Observation, Passage, States
from nemo_qwen_hidden.doctor.report import FAILED, OK, SKIPPED, Check
from nemo_qwen_hidden.errors import DataError
from nemo_qwen_hidden.hookpoint import HookPoint

LAYERS, HIDDEN = 2, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORM = torch.nn.RMSNorm(HIDDEN, eps=1e-6)
torch.nn.init.uniform_(NORM.weight, 0.5, 1.5)


def states(compute: str = "fp32", stored: str | None = None) -> dict[HookPoint, torch.Tensor]:
    """Random blocks, added up and normed by torch in ``compute``, then rounded to ``stored``."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[compute]
    found: dict[HookPoint, torch.Tensor] = {}
    stream = torch.randn(9, HIDDEN, generator=generator).to(dtype)
    found[HookPoint("embed")] = stream
    for layer in range(LAYERS):
        found[HookPoint("resid_pre", layer)] = stream
        for block, after in (("attn_out", "resid_mid"), ("mlp_out", "resid_post")):
            added = (3 * torch.randn(9, HIDDEN, generator=generator)).to(dtype)
            stream = stream + added
            found[HookPoint(block, layer)], found[HookPoint(after, layer)] = added, stream
    with torch.no_grad():
        found[HookPoint("final_norm")] = NORM.to(dtype)(stream).clone()
    NORM.float()
    return {point: values.to(DTYPES[stored or compute]).float().clone() for point, values in found.items()}


def observed(found: States, compute: str = "fp32", stored: str | None = None) -> Observation:
    passages = (
        Passage(document=4, token_ids=torch.arange(5)),
        Passage(document=7, token_ids=torch.arange(4), first_token=10),
    )
    return Observation(passages=passages, states=found, compute=compute, stored=stored or compute)


def checked(observation: Observation) -> dict[str, Check]:
    norm = algebra.FinalNorm(weight=NORM.weight.detach(), epsilon=1e-6)
    return {check.name: check for check in algebra.checks(observation, num_layers=LAYERS, norm=norm)}


@pytest.mark.parametrize(
    ("compute", "stored"), [("fp32", None), ("bf16", None), ("fp16", None), ("fp32", "bf16"), ("fp32", "fp16")]
)
def test_sums_hold_in_every_dtype(compute: str, stored: str | None) -> None:
    found = states(compute, stored)
    assert {check.status for check in checked(observed(found, compute, stored)).values()} == {OK}


@pytest.mark.parametrize(
    ("point", "broken"),
    [
        ("resid_mid@1", {algebra.ATTENTION_SUM, algebra.MLP_SUM}),
        ("attn_out@1", {algebra.ATTENTION_SUM}),
        ("resid_pre@1", {algebra.ATTENTION_SUM, algebra.TRANSPORT}),
        ("mlp_out@0", {algebra.MLP_SUM}),
        ("embed", {algebra.TRANSPORT}),
        ("final_norm", {algebra.NORM}),
    ],
)
@pytest.mark.parametrize("compute", DTYPES)
def test_a_changed_value_breaks_what_it_is_part_of(point: str, broken: set[str], compute: str) -> None:
    found = states(compute)
    found[HookPoint.parse(point)][6, 3] += 2
    failed = {name: check for name, check in checked(observed(found, compute)).items() if check.status == FAILED}
    assert set(failed) == broken
    for check in failed.values():
        assert check.place is not None
        assert (check.place.document, check.place.token) == (7, 11)


def test_two_roundings_are_one_too_many() -> None:
    """A sum of rounded terms that is not rounded itself agrees; one in a coarser dtype than is claimed does not."""
    assert checked(observed(states("bf16"), "fp32"))[algebra.ATTENTION_SUM].status == FAILED


@pytest.mark.parametrize(("value", "kind"), [(torch.nan, "NaN"), (torch.inf, "infinite")])
def test_values_that_are_not_finite_are_placed(value: float, kind: str) -> None:
    found = states()
    found[HookPoint("mlp_out", 0)][2, 0] = value
    check = checked(observed(found))[algebra.FINITE]
    assert check.status == FAILED and kind in check.detail
    assert str(check.place) == "mlp_out@0, document 4, token 2"


def test_what_is_not_there_is_skipped() -> None:
    only = {point: values for point, values in states().items() if point.site in ("embed", "resid_post")}
    skipped = {name for name, check in checked(observed(only)).items() if check.status == SKIPPED}
    assert skipped == {algebra.TRANSPORT, algebra.ATTENTION_SUM, algebra.MLP_SUM, algebra.NORM}


def test_rows_that_are_not_kept_do_not_count() -> None:
    found = states()
    kept = torch.ones(9, dtype=torch.bool)
    kept[6] = False
    for values in found.values():
        values[6] = torch.nan
    observation = replace(observed(found), kept=kept)
    assert {check.status for check in checked(observation).values()} == {OK}


@pytest.mark.parametrize("change", [lambda values: values[:5], lambda values: values[0]], ids=["rows", "dims"])
def test_states_have_a_row_for_each_token(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(DataError, match="must have a row for each of the 9 tokens"):
        observed({point: change(values) for point, values in states().items()})
