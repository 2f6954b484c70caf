"""The rows of each rank's stripe, by literals and as a property."""

from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.plan.microbatches import Batching, Microbatch, Segment, plan
from nemo_qwen_hidden.plan.slices import Run, runs_within, stripe


def run(first_row: int, length: int, sequence: int, token: int) -> Run:
    return Run(first_row=first_row, length=length, sequence=sequence, token=token)


def test_padded_batch_over_two_ranks() -> None:
    """Documents of 5 and 2 tokens, rows 10 to 14 and 20 to 21, padded to 6 tokens."""
    members = (Segment(first_row=10, length=5), Segment(first_row=20, length=2))
    microbatch = Microbatch(index=0, segments=members, tokens=6, packed=False)
    assert list(runs_within(microbatch, stripe(6, part=0, parts=2))) == [run(10, 3, 0, 0), run(20, 2, 1, 0)]
    assert list(runs_within(microbatch, stripe(6, part=1, parts=2))) == [run(13, 2, 0, 3)]


def test_packed_sequence_over_two_ranks() -> None:
    """The same documents end to end: 7 tokens, one of padding."""
    members = (Segment(first_row=10, length=5), Segment(first_row=20, length=2))
    microbatch = Microbatch(index=0, segments=members, tokens=8, packed=True)
    assert list(runs_within(microbatch, stripe(8, part=0, parts=2))) == [run(10, 4, 0, 0)]
    assert list(runs_within(microbatch, stripe(8, part=1, parts=2))) == [run(14, 1, 0, 4), run(20, 2, 0, 5)]


@given(st.lists(st.integers(0, 30), max_size=20), st.booleans(), st.integers(1, 5), st.sampled_from([1, 2, 3]))
def test_each_row_belongs_to_one_rank(lengths: list[int], packing: bool, parts: int, multiple_of: int) -> None:
    batching = Batching(max_tokens=16, batch_tokens=40, packing=packing, multiple_of=multiple_of)
    rows = []
    for microbatch in plan(lengths, batching):
        for part in range(parts):
            for found in runs_within(microbatch, stripe(microbatch.tokens, part=part, parts=parts)):
                rows += range(found.first_row, found.first_row + found.length)
    assert sorted(rows) == list(range(sum(lengths)))
