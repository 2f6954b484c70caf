"""A run as integers: by literals, and by the papers' own numbers."""

import pytest

from nemo_qwen_hidden.plan.training import (
    bubble,
    held_out,
    idle,
    microbatches_of,
    most_held,
    passes,
    sequences_of,
    steps_of,
)
from nemo_qwen_hidden.topology import Topology


def written(topology: Topology, rank: int, microbatches: int) -> str:
    """Passes as letters: forward through chunk 0, 1, ... is a, b, ..., back again A, B, ..."""
    return "".join("ab"[chunk] if forward else "AB"[chunk] for forward, chunk in passes(topology, rank, microbatches))


@pytest.mark.parametrize(
    ("topology", "rank", "microbatches", "order"),
    [
        (Topology(), 0, 3, "aAaAaA"),
        (Topology(pp=2), 0, 3, "aaAaAA"),
        (Topology(pp=2), 1, 3, "aAaAaA"),
        (Topology(pp=4), 0, 2, "aaAA"),
        (Topology(pp=2, vp=2), 1, 4, "aabBbBaAaAbBbBAA"),
        (Topology(pp=2, vp=2), 0, 2, "aabbBBAA"),
    ],
)
def test_what_a_rank_of_the_pipeline_does(topology: Topology, rank: int, microbatches: int, order: str) -> None:
    assert written(topology, rank, microbatches) == order


def test_of_each_pass_there_are_as_many_forward_as_back() -> None:
    for topology in (Topology(pp=3), Topology(pp=3, vp=2), Topology(pp=2, vp=2)):
        for rank in range(topology.pp):
            order = written(topology, rank, 12)
            assert {letter: order.count(letter) for letter in set(order)} == dict.fromkeys(set(order), 12)
            held = 0
            for letter in order:
                held += 1 if letter.islower() else -1
                assert held >= 0


def test_a_stage_holds_as_many_microbatches_as_stages_follow() -> None:
    """Narayanan et al. 2021, section 2.2.1: 1F1B holds at most pp microbatches, however many there are."""
    for microbatches in (4, 100):
        held = [most_held(Topology(pp=4), rank, microbatches, [10]) for rank in range(4)]
        assert held == [40, 30, 20, 10]
    assert most_held(Topology(pp=4), 0, 2, [10]) == 20
    assert most_held(Topology(), 0, 9, [7]) == 7


def test_interleaving_holds_more() -> None:
    """Korthikanti et al. 2022, section 4.2.3: the first stage holds 1 + (pp - 1) / (pp vp) times as much."""
    pp, vp, layers = 4, 2, 8
    plain = most_held(Topology(pp=pp), 0, 16, [layers])
    interleaved = most_held(Topology(pp=pp, vp=vp), 0, 16, [layers // vp] * vp)
    assert interleaved / plain == 1 + (pp - 1) / (pp * vp)


def test_the_pipeline_idles_as_published() -> None:
    """Narayanan et al. 2021, figures 3 and 4: 4 stages of 8 microbatches, and of 2 model chunks each."""
    assert bubble(Topology(pp=4), 8) == 3 / 8
    assert bubble(Topology(pp=4, vp=2), 8) == 3 / 16
    assert idle(Topology(pp=4), 8) == pytest.approx(3 / 11)
    assert idle(Topology(), 8) == 0


def test_steps_and_sequences() -> None:
    assert microbatches_of(Topology(tp=2, dp=2), global_batch_size=16, micro_batch_size=2) == 4
    assert [held_out(24, part) for part in (0.0, 0.05, 0.5, 0.999)] == [0, 2, 12, 24]
    assert [sequences_of(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
    assert list(steps_of(0, 7, 3)) == [0, 3, 6]
    assert list(steps_of(4, 9, 3)) == [6, 9]
    assert not steps_of(1, 2, 5)
