"""Where every rank stands, as literals, in Megatron-Core's default order tp-cp-ep-dp-pp."""

from collections import defaultdict

import pytest

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.topology import Topology, model_problems, resolve_dp, vocabulary_problems

# rank: (tp, dp, pp)
TP2_DP2_PP2 = {
    0: (0, 0, 0),
    1: (1, 0, 0),
    2: (0, 1, 0),
    3: (1, 1, 0),
    4: (0, 0, 1),
    5: (1, 0, 1),
    6: (0, 1, 1),
    7: (1, 1, 1),
}
TP2_DP1_PP3 = {0: (0, 0, 0), 1: (1, 0, 0), 2: (0, 0, 1), 3: (1, 0, 1), 4: (0, 0, 2), 5: (1, 0, 2)}
TP1_DP3_PP2 = {0: (0, 0, 0), 1: (0, 1, 0), 2: (0, 2, 0), 3: (0, 0, 1), 4: (0, 1, 1), 5: (0, 2, 1)}


@pytest.mark.parametrize(
    ("topology", "places"),
    [
        (Topology(tp=2, dp=2, pp=2), TP2_DP2_PP2),
        (Topology(tp=2, pp=3), TP2_DP1_PP3),
        (Topology(dp=3, pp=2), TP1_DP3_PP2),
        (Topology(), {0: (0, 0, 0)}),
    ],
)
def test_every_rank_has_its_place(topology: Topology, places: dict[int, tuple[int, int, int]]) -> None:
    assert topology.world == len(places)
    for rank, (tp, dp, pp) in places.items():
        place = topology.at(rank)
        assert (place.tp, place.dp, place.pp, place.rank) == (tp, dp, pp, rank)
        assert topology.rank(tp=tp, dp=dp, pp=pp) == rank


# megatron/core/parallel_state.py, initialize_model_parallel: its example of 16 GPUs with tp=2 and pp=4.
MEGATRON_DATA = [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
MEGATRON_TENSOR = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]
MEGATRON_PIPELINE = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


@pytest.mark.parametrize(
    ("axis", "groups"), [("dp", MEGATRON_DATA), ("tp", MEGATRON_TENSOR), ("pp", MEGATRON_PIPELINE)]
)
def test_groups_are_those_of_megatron_s_own_example(axis: str, groups: list[list[int]]) -> None:
    topology = Topology(tp=2, dp=2, pp=4)
    others = [other for other in ("tp", "dp", "pp") if other != axis]
    assert groups_of(topology, others) == groups


def groups_of(topology: Topology, others: list[str]) -> list[list[int]]:
    """Ranks that stand at the same places on the ``others`` axes."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in range(topology.world):
        found[tuple(getattr(topology.at(rank), other) for other in others)].append(rank)
    return sorted(found.values())


@pytest.mark.parametrize("topology", [Topology(tp=2, cp=2, dp=2, pp=2), Topology(tp=1, cp=3, dp=2, pp=2)])
@pytest.mark.parametrize("axis", ["tp", "cp", "dp", "pp"])
def test_groups_are_those_of_megatron_s_rank_generator(topology: Topology, axis: str) -> None:
    from megatron.core.parallel_state import RankGenerator

    sizes = {name: getattr(topology, name) for name in ("tp", "cp", "dp", "pp")}
    generator = RankGenerator(**sizes, ep=1, order="tp-cp-ep-dp-pp")
    others = [other for other in sizes if other != axis]
    assert groups_of(topology, others) == sorted(generator.get_ranks(axis))


@pytest.mark.parametrize(
    ("topology", "segment", "sequence"),
    [
        (Topology(tp=4), 1, 1),
        (Topology(tp=4, sp=True), 1, 4),
        (Topology(cp=3), 6, 6),
        (Topology(tp=4, cp=3, sp=True), 6, 12),
    ],
)
def test_lengths_have_to_be_multiples(topology: Topology, segment: int, sequence: int) -> None:
    assert (topology.segment_multiple, topology.sequence_multiple) == (segment, sequence)


def test_virtual_stages_go_round_the_pipeline_ranks() -> None:
    topology = Topology(pp=2, vp=3)
    assert (topology.world, topology.stages, list(topology.at(1).stages)) == (2, 6, [1, 3, 5])
    with pytest.raises(ConfigError, match=r"needs `parallel\.pp` of 2 or more"):
        Topology(vp=2)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_is_a_programming_error(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is not one of 8"):
        Topology(tp=2, dp=2, pp=2).at(rank)


@pytest.mark.parametrize("axis", ["tp", "pp", "dp"])
@pytest.mark.parametrize("size", [0, -1])
def test_an_axis_has_at_least_one_rank(axis: str, size: int) -> None:
    with pytest.raises(ConfigError) as refused:
        Topology(**{axis: size})  # type: ignore[arg-type]
    assert str(refused.value) == f"`parallel.{axis}` must be at least 1, but is {size} instead."


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    Topology(tp=2, sp=True)
    with pytest.raises(ConfigError, match=r"needs `parallel\.tp` of 2 or more") as refused:
        Topology(pp=2, sp=True)
    assert refused.value.setting == "parallel.sp"


def test_a_topology_in_words() -> None:
    assert str(Topology(tp=2, pp=3, dp=4, sp=True)) == "tp=2 pp=3 dp=4 sp=true"
    assert str(Topology(pp=2, vp=2, cp=2)) == "tp=1 pp=2 vp=2 cp=2 dp=1 sp=false"


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "world", "resolved"),
    [
        (2, 2, None, None, 1),
        (2, 2, 3, None, 3),
        (2, 2, None, 8, 2),
        (2, 2, None, 4, 1),
        (1, 1, None, 5, 5),
        (2, 1, 4, 8, 4),
    ],
)
def test_replicas_fill_the_ranks_started(tp: int, pp: int, dp: int | None, world: int | None, resolved: int) -> None:
    assert resolve_dp(tp=tp, pp=pp, cp=1, dp=dp, world=world) == resolved


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "world", "rule", "value"),
    [
        (2, 2, 3, 8, "must multiply to the number of ranks started (8)", "tp=2 x pp=2 x dp=3"),
        (2, 2, None, 6, "must divide the number of ranks started (6)", "tp=2 x pp=2"),
        (4, 1, None, 2, "must divide the number of ranks started (2)", "tp=4 x pp=1"),
        (0, 1, None, 2, "must divide the number of ranks started (2)", "tp=0 x pp=1"),
    ],
)
def test_ranks_that_do_not_match(tp: int, pp: int, dp: int | None, world: int, rule: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_dp(tp=tp, pp=pp, cp=1, dp=dp, world=world)
    assert (refused.value.setting, refused.value.rule, refused.value.value) == ("parallel", rule, value)


# Qwen2.5-0.5B
HALF_B = {"num_heads": 14, "num_query_groups": 2, "ffn_hidden_size": 4864}


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, sp=True), Topology(pp=24), Topology(tp=2, pp=5, dp=7)])
def test_layouts_that_fit_the_model(topology: Topology) -> None:
    assert model_problems(topology, **HALF_B) == []


@pytest.mark.parametrize(
    ("topology", "problems"),
    [
        (
            Topology(tp=4),
            [
                ("parallel.tp", "must divide `num_key_value_heads` (2)", 4),
            ],
        ),
    ],
)
def test_layouts_that_do_not(topology: Topology, problems: list[tuple[str, str, int]]) -> None:
    found = model_problems(topology, **HALF_B)
    assert [(problem.setting, problem.rule, problem.value) for problem in found] == problems


def test_tp_divides_the_vocabulary_of_a_model_that_is_trained() -> None:
    assert vocabulary_problems(Topology(tp=2), 151936) == []
    (problem,) = vocabulary_problems(Topology(tp=2), 383)
    assert str(problem) == "`parallel.tp` must divide `vocab_size` (383) for training, but is 2 instead."
