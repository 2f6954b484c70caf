"""The layout that is chosen: one that the model can run in, and that fits wherever one does; and the known answers."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import LAYERLESS_SITES, SITES, expand
from nemo_qwen_hidden.plan.auto import FILLED, Choice, choose
from nemo_qwen_hidden.plan.cost import Machine, Speeds, Work, need_of, secs_of
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.topology import Topology, model_problems

GB = 10**9
GPU = Speeds(flops=4e14, memory=2.7e12, near=3e11, far=4e10, latency=2e-5)
CORE = Speeds(flops=9e10, memory=1.5e10, near=1e9, far=1e9, latency=3e-4)


def qwen(layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int = 151936) -> DecoderShape:
    return DecoderShape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
    )


# config.json of Qwen/Qwen2.5-*
MODELS = {
    "0.5B": qwen(24, 896, 14, 2, 4864),
    "1.5B": qwen(28, 1536, 12, 2, 8960),
    "3B": qwen(36, 2048, 16, 2, 11008),
    "7B": qwen(28, 3584, 28, 4, 18944, 152064),
    "14B": qwen(48, 5120, 40, 8, 13824, 152064),
    "32B": qwen(64, 5120, 40, 8, 27648, 152064),
    "72B": qwen(80, 8192, 64, 8, 29568, 152064),
}


def work(
    model: str, *, points: tuple[str, ...] = ("resid_post@-1",), max_tokens: int = 4096, itemsize: int = 2
) -> Work:
    shape = MODELS[model]
    return Work(
        shape=shape,
        layers=shape.num_layers,
        points=expand(points, num_layers=shape.num_layers),
        batch_tokens=4096,
        max_tokens=max_tokens,
        itemsize=itemsize,
    )


def gpus(world: int | None, gb: float, per_machine: int = 8) -> Machine:
    return Machine(world=world, per_machine=per_machine, memory_bytes=int(gb * GB), base_bytes=2 * GB, speeds=GPU)


def cores(count: int, gb: float) -> Machine:
    """A machine of ``count`` cores and ``gb`` GB which its ranks share."""
    return Machine(
        world=None,
        per_machine=count,
        memory_bytes=int(gb * GB),
        base_bytes=GB,
        speeds=Speeds(flops=count * CORE.flops, memory=CORE.memory, near=CORE.near, far=CORE.far, latency=CORE.latency),
        shared_memory=True,
        shared_cores=True,
    )


def every_layout(task: Work, machine: Machine) -> Iterator[Topology]:
    """By plain loops over all sizes."""
    shape = task.shape
    for world in machine.worlds:
        sizes = range(1, world + 1)
        for tp, pp in ((tp, pp) for tp in sizes if world % tp == 0 for pp in sizes if world // tp % pp == 0):
            for cp in (cp for cp in sizes if world // tp // pp % cp == 0):
                for sp in {False, tp > 1 and not machine.shared_cores}:
                    found = Topology(tp=tp, pp=pp, cp=cp, dp=world // tp // pp // cp, sp=sp)
                    together = world <= machine.per_machine or machine.per_machine % tp == 0
                    if together and pp <= task.layers and not problems(found, shape):
                        yield found


def problems(topology: Topology, shape: DecoderShape) -> list[object]:
    return list(
        model_problems(
            topology,
            num_heads=shape.num_heads,
            num_query_groups=shape.num_query_groups,
            ffn_hidden_size=shape.ffn_hidden_size,
        )
    )


def fits(topology: Topology, task: Work, machine: Machine) -> bool:
    return need_of(topology, task).total + machine.base_bytes <= FILLED * machine.rank_bytes(topology.world)


tasks = st.builds(
    work,
    st.sampled_from(sorted(MODELS)),
    points=st.sampled_from([("resid_post@-1",), ("all",), ("embed", "final_norm"), ("mlp_act@:", "rot_k@:")]),
    max_tokens=st.sampled_from([128, 4096, 32768, 131072]),
    itemsize=st.sampled_from([2, 4]),
)
machines = st.one_of(
    st.builds(
        lambda nodes, per_machine, gb: gpus(nodes * per_machine, gb, per_machine),
        st.integers(1, 8),
        st.integers(1, 8),
        st.integers(8, 141),
    ),
    st.builds(lambda count, gb: gpus(None, gb, count), st.integers(1, 16), st.integers(8, 141)),
    st.builds(cores, st.integers(1, 16), st.integers(8, 1000)),
)


@given(tasks, machines)
@settings(max_examples=150, deadline=None)
def test_the_best_of_all_that_fit(task: Work, machine: Machine) -> None:
    possible = {topology: fits(topology, task, machine) for topology in every_layout(task, machine)}
    try:
        choice = choose(task, machine)
    except ConfigError as error:
        assert not any(possible.values())
        assert error.setting == "parallel.memory_gb"
        return
    chosen = choice.topology
    assert possible[chosen]
    assert machine.world in (None, chosen.world)
    without_cp = [topology for topology, fit in possible.items() if fit and topology.cp == 1]
    rivals = without_cp or [topology for topology, fit in possible.items() if fit]
    assert chosen in rivals
    assert secs_of(chosen, task, machine) <= 1.01 * min(secs_of(rival, task, machine) for rival in rivals)


@given(tasks, machines)
@settings(max_examples=50, deadline=None)
def test_what_the_refusal_asks_for_is_enough_and_not_too_much(task: Work, machine: Machine) -> None:
    """The value in the message is what would fit, rounded up to three digits."""
    if any(fits(topology, task, machine) for topology in every_layout(task, machine)):
        return
    with pytest.raises(ConfigError) as refused:
        choose(task, machine)
    asked = float(refused.value.rule.split()[4])
    by_rank = {"base_bytes": machine.base_bytes, "speeds": machine.speeds, "per_machine": machine.per_machine}
    choose(task, Machine(world=machine.world, memory_bytes=int(asked * GB), **by_rank))  # type: ignore[arg-type]
    if not machine.shared_memory:
        with pytest.raises(ConfigError):
            choose(task, Machine(world=machine.world, memory_bytes=int(asked * 0.989 * GB), **by_rank))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "machine", "expected"),
    [
        # one rank
        (work("0.5B"), gpus(1, 8), Topology()),
        # what fits a rank is copied to each
        (work("0.5B"), gpus(8, 8), Topology(dp=8)),
        (work("7B"), gpus(64, 80), Topology(dp=64)),
        # 145 GB of weights: two stages of 72.7 GB do not fit in nine tenths of 80, four do; replicas take the rest
        (work("72B"), gpus(8, 80), Topology(pp=4, dp=2)),
        (work("72B"), gpus(16, 80), Topology(pp=4, dp=4)),
        (work("72B"), gpus(2, 141), Topology(pp=2)),
        # not pp=8: the 28 layers would be 4 or 3 a stage, and all wait for the 4
        (work("7B"), gpus(8, 9), Topology(pp=4, dp=2)),
        # neither 5 nor 7 divide 24 layers, but replicas need no divisor
        (work("0.5B"), gpus(7, 8), Topology(dp=7)),
        # long sequences: activations fit only where a layer is divided
        (work("72B", points=("all",), max_tokens=131072), gpus(8, 80), Topology(tp=4, pp=2, sp=True)),
        # where nobody fixed the number of ranks, all GPUs are used
        (work("0.5B"), gpus(None, 24), Topology(dp=8)),
        # seven stages of at most 10 of the 64 layers are quicker than three replicas of two stages on six ranks
        (work("32B"), gpus(None, 48, per_machine=7), Topology(pp=7)),
        # on a CPU, one rank with all cores
        (work("7B", itemsize=4), cores(16, 64), Topology()),
    ],
)
def test_known_answers(task: Work, machine: Machine, expected: Topology) -> None:
    assert choose(task, machine).topology == expected


def test_cp_where_nothing_else_divides_a_sequence() -> None:
    """One layer whose single group of keys and values no tp can divide."""
    shape = qwen(1, 4096, 32, 1, 16384)
    task = Work(
        shape=shape,
        layers=1,
        points=expand("resid_post@0", num_layers=1),
        batch_tokens=4096,
        max_tokens=131072,
        itemsize=2,
    )
    choice = choose(task, gpus(4, 16))
    assert choice.topology == Topology(cp=4)
    assert ("cp=4", "divides a single sequence; nothing fits without that") in choice.reasons


def test_the_reasons_and_each_neighbour() -> None:
    choice = choose(work("72B", points=("all",), max_tokens=32768), gpus(8, 80))
    assert choice.reasons == (
        ("ranks", "8 started, 80.0 GB each, of which 90% may be filled"),
        ("memory", "65.4 GB: weights 37.6, activations 15.1, states 10.7, program 2.0"),
        ("pp=4", "divides the layers; sends one state a microbatch, while it computes"),
        ("dp=2", "sends nothing, so it gets all ranks that the model leaves free"),
    )
    assert why(choice) == {
        "tp=2 pp=2 cp=1 dp=2": "slower",
        "tp=1 pp=2 cp=2 dp=2": "22.1 GB too much",
        "tp=1 pp=2 cp=1 dp=4": "39.3 GB too much",
        "tp=2 pp=4 cp=1 dp=1": "slower",
        "tp=1 pp=8 cp=1 dp=1": "no faster, sends more",
        "tp=1 pp=4 cp=2 dp=1": "cp is for what does not fit without it",
    }


def test_neighbours_that_the_model_or_the_machine_rules_out() -> None:
    reasons = why(choose(work("0.5B"), gpus(4, 80, per_machine=1)))
    assert reasons["tp=2 pp=1 cp=1 dp=2"] == "tp must divide the ranks of a machine (1)"
    by_seven = why(choose(work("0.5B"), gpus(7, 8)))
    assert by_seven["tp=7 pp=1 cp=1 dp=1"] == "tp must divide `num_key_value_heads` (2)"


def why(choice: Choice) -> dict[str, str]:
    axes = ("tp", "pp", "cp", "dp")
    return {
        " ".join(f"{axis}={getattr(rejected.topology, axis)}" for axis in axes): rejected.why
        for rejected in choice.rejected
    }


def test_a_model_too_large_for_all_ranks() -> None:
    with pytest.raises(ConfigError) as refused:
        choose(work("72B", max_tokens=32768), gpus(1, 80))
    assert str(refused.value) == (
        "`parallel.memory_gb` must be at least 176 for this model on one rank: 95.4 GB a rank are missing in the "
        "nearest layout, tp=1 pp=1 dp=1 sp=false, where weights take 142.9 GB, the program 2.0 GB, and what "
        "grows with `data.max_tokens` and `data.batch_tokens` 12.9 GB, but is 80.0 instead."
    )


def test_what_is_taken_counts() -> None:
    """Heads and inner units travel once within the tp group, so their largest hook point counts twice."""
    states = {
        site: need_of(Topology(), work("0.5B", points=(site if site in LAYERLESS_SITES else f"{site}@3",))).states
        for site in SITES
    }
    per_token = {site: taken / (4096 * 2) for site, taken in states.items()}
    assert {site: per_token[site] for site in ("embed", "resid_mid", "final_norm", "k", "mlp_act", "attn_weights")} == {
        "embed": 896,
        "resid_mid": 896,
        "final_norm": 896,
        "k": 2 * 128,
        "mlp_act": 2 * 4864,
        "attn_weights": 2 * 14 * 4096,
    }
