"""Bytes of a rank in training, by published sizes."""

from dataclasses import replace

import pytest

from nemo_qwen_hidden.checkpoint.published import published
from nemo_qwen_hidden.hookpoint import expand
from nemo_qwen_hidden.plan.stages import stages_of
from nemo_qwen_hidden.plan.training_memory import (
    Training,
    checkpoint_bytes,
    held_bytes,
    model_parameters,
    rank_memory,
    rank_parameters,
)
from nemo_qwen_hidden.topology import Topology

QWEN_7B = published("7B")


def training(topology: Topology, **more: object) -> Training:
    shape = QWEN_7B.shape
    sizes: dict[str, object] = {
        "stages": stages_of(shape.num_layers, pp=topology.pp, vp=topology.vp),
        "tied": False,
        "itemsize": 2,
        "seq_length": 4096,
        "micro_batch_size": 1,
        "microbatches": 8,
        "recompute": "none",
        "recompute_layers": 1,
    }
    return Training(shape=shape, topology=topology, **sizes | more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "parameters"), [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)]
)
def test_parameters_are_those_of_the_checkpoints(name: str, parameters: int) -> None:
    """As their safetensors headers on the hub sum to."""
    model = published(name)
    assert model_parameters(model.shape, tied=model.tied) == parameters
    assert 1 < checkpoint_bytes(model.shape, tied=model.tied, tp=8, itemsize=2) / (14 * parameters) < 1.005


@pytest.mark.parametrize(
    "topology", [Topology(tp=4), Topology(pp=4), Topology(pp=2, vp=2), Topology(tp=2, pp=2)], ids=str
)
def test_ranks_share_the_parameters(topology: Topology) -> None:
    """All but norms, which are whole on each tp rank."""
    run, shape = training(topology), QWEN_7B.shape
    held = sum(rank_parameters(run, rank) for rank in range(topology.pp)) * topology.tp
    again = (topology.tp - 1) * (2 * shape.num_layers + 1) * shape.hidden_size
    assert held == model_parameters(shape, tied=False) + again


def test_a_tied_table_is_on_both_ends_of_a_pipeline() -> None:
    small = published("0.5B")
    stages = stages_of(small.shape.num_layers, pp=2)
    run = replace(training(Topology(pp=2)), shape=small.shape, stages=stages, tied=True)
    table = small.shape.vocab_size * small.shape.hidden_size
    held = rank_parameters(run, 0) + rank_parameters(run, 1)
    assert held == model_parameters(small.shape, tied=True) + table
    assert rank_parameters(replace(run, topology=Topology(), stages=stages[:1]), 0) > table


def test_half_precision_takes_18_bytes_a_parameter() -> None:
    """Weights 2, gradients 4, and of the optimizer the weights, mean and variance in 4 each (Megatron's
    ``theoretical_memory_usage.py`` without the distributed optimizer)."""
    need = rank_memory(training(Topology(tp=8, pp=2)), 0)
    assert need.weights + need.gradients + need.optimizer == 18 * need.parameters


def test_what_is_computed_again_is_not_held() -> None:
    held = {
        how: held_bytes(training(Topology(tp=4), recompute=how, recompute_layers=layers), 0)
        for how, layers in (("none", 1), ("selective", 1), ("block", 7), ("uniform", 1))
    }
    assert held["none"] > held["selective"] > held["block"] > held["uniform"]
    every = training(Topology(tp=4), recompute="block", recompute_layers=28)
    assert held_bytes(every, 0) == held["uniform"]


def test_captured_states_wait_in_a_queue() -> None:
    points = expand(("resid_post@0", "resid_post@27"), num_layers=28)
    run = training(Topology(tp=2, pp=2, dp=2), points=points, captured_rows=(8192,), captured_itemsize=2)
    for rank in (0, 1):
        need = rank_memory(run, rank)
        assert need.states == 8192 // 4 * 3584 * 2
        assert need.queue == 2 * need.states
    large = rank_memory(replace(run, captured_rows=(2**20, 2**20)), 0)
    assert large.queue == 2 * large.states == 2 * 2**20 // 4 * 3584 * 2
