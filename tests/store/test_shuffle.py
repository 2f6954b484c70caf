"""The order of a data set: a permutation in constant memory, dealt to ranks without overlap or loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.read.shuffle import REMAINDERS, Deal, Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_each_number_once(count: int) -> None:
    for epoch in range(3):
        found = Permutation(count, seed=1, epoch=epoch)[np.arange(count)]
        assert found.dtype == np.int64 and np.array_equal(np.sort(found), np.arange(count))


def test_the_order_is_pinned() -> None:
    assert Permutation(10, seed=0)[np.arange(10)].tolist() == [5, 8, 1, 9, 0, 2, 4, 3, 6, 7]
    large = Permutation(10**15, seed=3, epoch=2)[np.array([0, 1, 10**15 - 1])]
    assert large.tolist() == [562211365732576, 388979243051536, 81607294122596]


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {
        tuple(Permutation(50, seed=seed, epoch=epoch)[np.arange(50)].tolist())
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


def test_it_is_as_random_as_a_shuffle() -> None:
    """Where numbers go, over many seeds, and how far neighbours are apart in one large order."""
    counts = np.zeros((12, 12))
    for seed in range(3000):
        counts[np.arange(12), Permutation(12, seed=seed)[np.arange(12)]] += 1
    chi_square = ((counts - 250) ** 2 / 250).sum()
    assert 121 - 5 * 15.6 < chi_square < 121 + 5 * 15.6  # 11 * 11 degrees of freedom
    order = Permutation(100_000, seed=0)[np.arange(100_000)]
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.abs(np.diff(order)).mean() / (100_000 / 3) - 1) < 0.02


DEALS = st.builds(
    dict,
    count=st.integers(0, 60),
    size=st.integers(1, 9),
    world=st.integers(1, 5),
    remainder=st.sampled_from(REMAINDERS),
    seed=st.none() | st.integers(0, 3),
)


@given(DEALS, st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_ranks_get_everything_once(options: dict[str, int], epoch: int) -> None:
    deals = [Deal(rank=rank, **options) for rank in range(options["world"])]
    batches = [[deal.members(epoch * len(deal) + batch) for batch in range(len(deal))] for deal in deals]
    count, size = options["count"], options["size"]
    every = [member for rank in batches for batch in rank for member in batch.tolist()]
    if options["remainder"] == "keep":
        assert sorted(every) == list(range(count))
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
        assert sum(len(batch) != size for rank in batches for batch in rank) <= 1
    else:
        assert len({len(rank) for rank in batches}) == 1
        assert all(len(batch) == size for rank in batches for batch in rank)
        if options["remainder"] == "drop":
            assert len(every) == len(set(every)) and count - len(every) < size * options["world"]
        else:
            assert set(every) == set(range(count)) and len(every) - count < size * options["world"]


def test_a_world_shares_one_order() -> None:
    alone = Deal(count=50, size=4, seed=5)
    ranks = [Deal(count=50, size=4, seed=5, rank=rank, world=3) for rank in range(3)]
    for number in range(len(alone)):
        assert np.array_equal(alone.members(number), ranks[number % 3].members(number // 3))


def test_epochs_follow_each_other() -> None:
    deal = Deal(count=10, size=4, seed=0)
    assert len(deal) == 3
    first, second = ([deal.members(number) for number in epoch] for epoch in (range(3), range(3, 6)))
    assert [len(batch) for batch in second] == [4, 4, 2]
    orders = [np.concatenate(batches).tolist() for batches in (first, second)]
    assert orders[0] != orders[1] and all(sorted(order) == list(range(10)) for order in orders)


def test_without_a_seed_the_order_is_that_of_the_store() -> None:
    deal = Deal(count=5, size=2, seed=None)
    assert [deal.members(number).tolist() for number in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 0}, "`batch size` must be at least 1, but is 0"),
        ({"rank": 2, "world": 2}, "`rank` must be from 0 to 1, with a world of 2, but is 2"),
        ({"rank": 0, "world": 0}, "`rank` must be"),
        ({"remainder": "lose"}, "`remainder` must be one of keep, drop, repeat, but is 'lose'"),
    ],
)
def test_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(StoreError, match=said):
        Deal(**({"count": 5, "size": 1} | options))  # type: ignore[arg-type]


def test_there_is_no_such_batch() -> None:
    for deal, number in (
        (Deal(count=5, size=2), -1),
        (Deal(count=0, size=2), 0),
        (Deal(count=3, size=4, remainder="drop"), 0),
    ):
        with pytest.raises(IndexError, match=f"batch {number} is not one of"):
            deal.members(number)
