"""What a job takes: against torch's own count of products, published sizes, and numbers worked out by hand."""

from dataclasses import replace
from math import inf

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2Model

from nemo_qwen_hidden.checkpoint.published import NAMES, published
from nemo_qwen_hidden.hookpoint import HookPoint, expand
from nemo_qwen_hidden.plan.cost import Machine, Speeds, Work, load_of
from nemo_qwen_hidden.plan.footprint import layer_parameters
from nemo_qwen_hidden.plan.hardware import Host
from nemo_qwen_hidden.plan.scaling import Corpus, Estimate, estimate
from nemo_qwen_hidden.plan.shapes import state_width
from nemo_qwen_hidden.plan.stages import split_layers
from nemo_qwen_hidden.topology import Topology

# Qwen2.5 Technical Report (2024), table 1, and the model cards: parameters, and those that are not of embeddings
PUBLISHED = {
    "0.5B": (0.49e9, 0.36e9),
    "1.5B": (1.54e9, 1.31e9),
    "3B": (3.09e9, 2.77e9),
    "7B": (7.61e9, 6.53e9),
    "14B": (14.7e9, 13.1e9),
    "32B": (32.5e9, 31.0e9),
    "72B": (72.7e9, 70.0e9),
}
SPEEDS = Speeds(flops=1e15, memory=inf, near=1e12, far=1e11, latency=0.0)
HOST = Host(tokenize=inf, copy=1e10, seal=inf, machine=1e11, store=1e12)


def work(name: str, *points: str, batch_tokens: int = 4096, max_tokens: int = 4096) -> Work:
    shape = published(name).shape
    found = expand(points or ("resid_post@-1",), num_layers=shape.num_layers)
    return Work(
        shape=shape,
        layers=max(point.depth(shape.num_layers) for point in found),
        points=found,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        itemsize=2,
    )


def machine(world: int, speeds: Speeds = SPEEDS) -> Machine:
    return Machine(world=world, per_machine=min(world, 8), memory_bytes=1, base_bytes=0, speeds=speeds)


def estimated(
    task: Work, topology: Topology, *, tokens: int = 10**9, states: int | None = None, host: Host = HOST, **more: bool
) -> Estimate:
    def stored(point: HookPoint) -> int:
        return 2 * state_width(point, task.shape, keys=task.max_tokens)

    return estimate(
        topology,
        split_layers(task.layers, topology.pp),
        task,
        machine(topology.world),
        host,
        Corpus(tokens=tokens, states=tokens if states is None else states, window=task.max_tokens),
        state_bytes=stored,
        **more,
    )


@pytest.mark.parametrize("name", NAMES)
def test_published_parameters(name: str) -> None:
    architecture = published(name)
    shape, (total, inner) = architecture.shape, PUBLISHED[name]
    layers = shape.num_layers * layer_parameters(shape, 1) + shape.hidden_size
    table = shape.vocab_size * shape.hidden_size
    assert layers == pytest.approx(inner, rel=0.01)
    assert layers + (1 if architecture.tied else 2) * table == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("name", ["0.5B", "7B", "72B"])
@pytest.mark.parametrize("tokens", [64, 4096])
def test_products_are_what_torch_counts(name: str, tokens: int) -> None:
    """Two layers of transformers' model. Torch counts all of the two products of attention, of which the causal mask
    leaves half, and neither biases nor norms, which are counted here as if they were products."""
    shape = published(name).shape
    config = Qwen2Config(
        num_hidden_layers=2,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_query_groups,
        intermediate_size=shape.ffn_hidden_size,
        vocab_size=8,
        attn_implementation="eager",
    )
    with FakeTensorMode(), torch.no_grad():
        model = Qwen2Model(config)
        with FlopCounterMode(display=False) as counter:
            model(inputs_embeds=torch.empty(1, tokens, shape.hidden_size), use_cache=False)
    masked = 2 * 2 * shape.num_heads * shape.head_dim * tokens * tokens  # of two layers, the half that is masked
    load = load_of(Topology(), work(name, "resid_post@1", batch_tokens=tokens, max_tokens=tokens))
    assert load.flops == pytest.approx(counter.get_total_flops() - masked, rel=1e-3)


def test_a_replica_that_computes() -> None:
    """14 of 28 layers, each 233 M parameters; 2 x 2 x 3584 x 4096 / 2 for attention; 1e15 a second on each of 8."""
    found = estimated(work("7B", "resid_post@13"), Topology(dp=8))
    flops = 14 * (2 * 233_057_792 + 2 * 3584 * 4096) * 1e9
    assert found.run_secs == pytest.approx(flops / 8e15)
    assert found.binds.name == "products"
    assert found.stored_bytes == 10**9 * 3584 * 2
    assert found.rank_hours == pytest.approx(8 * found.secs / 3600)
    assert found.pace(found.of("store")) == pytest.approx(found.stored_bytes / found.run_secs)


def test_a_disk_that_is_too_slow() -> None:
    """28 states of 3584 numbers of 2 bytes for each of 1e9 tokens, at 1e9 a second, and sealed at as much."""
    host = replace(HOST, store=1e9, seal=1e9)
    found = estimated(work("7B", "all"), Topology(dp=8), host=host)
    assert found.stored_bytes == 28 * 3584 * 2 * 10**9
    assert (found.run_secs, found.after_secs) == (pytest.approx(200_704), pytest.approx(200_704))
    assert found.binds.name == "store"
    assert found.pace(found.of("products")) < 1e15


def test_states_of_the_last_stage_leave_through_its_machines_alone() -> None:
    """Pipeline stages are the outermost axis: the last of four has ranks 48 to 63, on two of eight machines."""
    found = estimated(work("72B"), Topology(pp=4, dp=16))
    total = 8192 * 2 * 10**9
    assert found.of("machine").amount == pytest.approx(total / 2)
    assert found.of("copy").amount == pytest.approx(total / 16)
    assert found.of("store").amount == total
    evenly = estimated(work("72B"), Topology(tp=8, dp=8))
    assert evenly.of("machine").amount == pytest.approx(total / 8)
    assert evenly.of("copy").amount == pytest.approx(total / 64)


def test_links() -> None:
    """Per microbatch of 4096 tokens of 8192 numbers of 2 bytes: 2 all-reduces a layer, of which each of 4 ranks sends
    2 x 3/4; one state to the next stage, of which each tp rank has all; of keys and values each cp rank lacks half."""
    hidden = 4096 * 8192 * 2
    load = load_of(Topology(tp=4, pp=2), work("72B"))
    assert load.tp == 40 * 2 * 2 * 3 / 4 * hidden
    assert (load.tp_exchanges, load.pp, load.pp_sends) == (80, hidden, 1)
    split = load_of(Topology(tp=4, pp=2, sp=True), work("72B"))
    assert (split.tp, split.tp_exchanges, split.pp) == (load.tp, 160, hidden / 4)
    gathered = load_of(Topology(cp=2), work("72B"))
    assert gathered.cp == 80 * 4096 * 2 * 8 * 128 * 2 / 2
    assert gathered.flops == load_of(Topology(), work("72B")).flops / 2


def test_heads_travel_over_tp() -> None:
    """Of a state of 64 x 128 numbers each of 4 ranks sends three quarters of its quarter."""
    found = estimated(work("72B", "z@79"), Topology(tp=4))
    assert found.of("states over tp").amount == pytest.approx(10**9 * 8192 * 2 / 4 * 3 / 4)
    assert not any(use.name == "states over tp" for use in estimated(work("72B"), Topology(tp=4)).uses)


def test_only_states_that_are_kept_are_copied_and_stored() -> None:
    every, some = (estimated(work("7B"), Topology(dp=8), states=states) for states in (10**9, 10**7))
    assert some.of("products").amount == every.of("products").amount
    for name in ("copy", "machine", "store", "seal"):
        assert some.of(name).amount == pytest.approx(every.of(name).amount / 100)


def test_what_is_gathered_on_rank_0() -> None:
    found = estimated(work("7B"), Topology(dp=64), to_rank_0=True)
    assert found.of("to rank 0").amount == pytest.approx(63 / 64 * found.stored_bytes)
    assert found.of("machine").amount == found.of("seal").amount == found.stored_bytes


def test_tokenizing_comes_first_and_may_bind() -> None:
    found = estimated(work("0.5B"), Topology(dp=8), host=replace(HOST, tokenize=1e5))
    assert found.before_secs == 10**4
    assert found.secs == found.before_secs + found.run_secs + found.after_secs
    assert found.binds.name == "tokenize"


def test_virtual_stages_send_more_and_run_as_many_layers() -> None:
    task = work("7B")
    corpus = Corpus(tokens=10**9, states=10**9, window=4096)
    plain, virtual = (
        estimate(layout, split_layers(28, stages), task, machine(2), HOST, corpus, state_bytes=lambda point: 7168)
        for layout, stages in ((Topology(pp=2), 2), (Topology(pp=2, vp=2), 4))
    )
    assert virtual.of("products").amount == plain.of("products").amount
    assert virtual.of("pp").amount == 2 * plain.of("pp").amount
