"""Every row is run once, whatever the batching; and the plan depends on the data alone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.plan.microbatches import Batching, Microbatch, Segment, plan, replica_of, segments

lengths_of_documents = st.lists(st.integers(0, 40), max_size=60)
batchings = st.builds(
    Batching,
    max_tokens=st.integers(1, 50),
    batch_tokens=st.integers(1, 100),
    packing=st.booleans(),
    multiple_of=st.sampled_from([1, 2, 4]),
)


def rows_of(microbatches: list[Microbatch]) -> list[int]:
    members = itertools.chain.from_iterable(microbatch.segments for microbatch in microbatches)
    return sorted(row for s in members for row in range(s.first_row, s.first_row + s.length))


def test_long_documents_become_windows() -> None:
    assert list(segments([5, 0, 2], max_tokens=2)) == [
        Segment(first_row=0, length=2),
        Segment(first_row=2, length=2),
        Segment(first_row=4, length=1),
        Segment(first_row=5, length=2),
    ]


def test_packed_and_padded_by_literals() -> None:
    options = {"max_tokens": 8, "batch_tokens": 8}
    packed = list(plan([3, 5, 2], Batching(packing=True, **options)))
    assert [(m.tokens, m.sequences, [s.first_row for s in m.segments]) for m in packed] == [
        (8, 1, [3, 0]),
        (2, 1, [8]),
    ]
    padded = list(plan([3, 5, 2], Batching(packing=False, **options)))
    assert [(m.tokens, m.sequences, [s.first_row for s in m.segments]) for m in padded] == [
        (5, 1, [3]),
        (3, 2, [0, 8]),
    ]


@given(lengths_of_documents, batchings)
def test_every_row_once(lengths: list[int], batching: Batching) -> None:
    microbatches = list(plan(lengths, batching))
    assert rows_of(microbatches) == list(range(sum(lengths)))
    assert [microbatch.index for microbatch in microbatches] == list(range(len(microbatches)))


@given(lengths_of_documents, batchings)
def test_shapes(lengths: list[int], batching: Batching) -> None:
    for microbatch in plan(lengths, batching):
        assert microbatch.tokens % batching.multiple_of == 0
        assert microbatch.tokens * microbatch.sequences <= batching.batch_tokens or len(microbatch.segments) == 1
        for segment, sequence, offset in microbatch.places():
            assert 0 <= sequence < microbatch.sequences
            assert offset + segment.length <= microbatch.tokens
            assert segment.length <= batching.max_tokens


@given(lengths_of_documents, batchings, st.integers(1, 4))
def test_replicas_share_the_microbatches(lengths: list[int], batching: Batching, dp: int) -> None:
    microbatches = list(plan(lengths, batching))
    shares = [[m for m in microbatches if replica_of(m, dp) == replica] for replica in range(dp)]
    assert sorted(m.index for share in shares for m in share) == list(range(len(microbatches)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("packing", [True, False])
def test_little_is_padded(packing: bool) -> None:
    """Documents of 1 to 100 tokens, shuffled by a fixed stride."""
    lengths = [1 + 37 * n % 100 for n in range(1000)]
    microbatches = list(plan(lengths, Batching(max_tokens=128, batch_tokens=1024, packing=packing)))
    computed = sum(microbatch.tokens * microbatch.sequences for microbatch in microbatches)
    assert computed <= sum(lengths) * (1.0 if packing else 1.05)
