"""The rows of each rank's stripe, by literals and as a property."""

from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.plan.microbatches import Batching, Microbatch, Segment, plan
from nemo_qwen_hidden.plan.slices import Run, runs_within, spans_of, stripe
from nemo_qwen_hidden.topology import Topology


def run(first_row: int, length: int, sequence: int, index: int) -> Run:
    return Run(first_row=first_row, length=length, sequence=sequence, index=index)


def held(microbatch: Microbatch, owned: range, *, part: int = 0, parts: int = 1) -> list[Run]:
    return list(runs_within(microbatch, spans_of(microbatch, part=part, parts=parts), owned))


def test_padded_batch_over_two_ranks() -> None:
    """Documents of 5 and 2 tokens, rows 10 to 14 and 20 to 21, padded to 6 tokens."""
    members = (Segment(first_row=10, length=5), Segment(first_row=20, length=2))
    microbatch = Microbatch(index=0, segments=members, tokens=6, packed=False)
    assert held(microbatch, stripe(6, part=0, parts=2)) == [run(10, 3, 0, 0), run(20, 2, 1, 0)]
    assert held(microbatch, stripe(6, part=1, parts=2)) == [run(13, 2, 0, 3)]


def test_packed_sequence_over_two_ranks() -> None:
    """The same documents end to end: 7 tokens, one of padding."""
    members = (Segment(first_row=10, length=5), Segment(first_row=20, length=2))
    microbatch = Microbatch(index=0, segments=members, tokens=8, packed=True)
    assert held(microbatch, stripe(8, part=0, parts=2)) == [run(10, 4, 0, 0)]
    assert held(microbatch, stripe(8, part=1, parts=2)) == [run(14, 1, 0, 4), run(20, 2, 0, 5)]


def test_a_padded_batch_in_zigzag() -> None:
    """The same over two context-parallel ranks: 8 tokens in 4 chunks; rank 0 has the outer ones."""
    members = (Segment(first_row=10, length=5), Segment(first_row=20, length=2))
    microbatch = Microbatch(index=0, segments=members, tokens=8, packed=False)
    assert spans_of(microbatch, part=0, parts=2) == (range(0, 2), range(6, 8))
    assert spans_of(microbatch, part=1, parts=2) == (range(2, 4), range(4, 6))
    assert held(microbatch, range(4), part=0, parts=2) == [run(10, 2, 0, 0), run(20, 2, 1, 0)]
    assert held(microbatch, range(4), part=1, parts=2) == [run(12, 2, 0, 0), run(14, 1, 0, 2)]
    assert held(microbatch, range(2, 4), part=1, parts=2) == [run(14, 1, 0, 2)]


def test_each_packed_document_is_cut_by_itself() -> None:
    """Padded to 8 and 4 tokens, and 4 more at the end."""
    members = (Segment(first_row=10, length=5), Segment(first_row=20, length=2))
    microbatch = Microbatch(index=0, segments=members, tokens=16, packed=True, segment_multiple=4)
    assert microbatch.bounds() == [0, 8, 12, 16]
    assert spans_of(microbatch, part=1, parts=2) == tuple(
        range(start, start + size) for start, size in ((2, 2), (4, 2), (9, 1), (10, 1), (13, 1), (14, 1))
    )
    assert held(microbatch, range(8), part=0, parts=2) == [run(10, 2, 0, 0), run(20, 1, 0, 4)]
    assert held(microbatch, range(8), part=1, parts=2) == [run(12, 2, 0, 0), run(14, 1, 0, 2), run(21, 1, 0, 4)]


@given(
    st.lists(st.integers(0, 30), max_size=20),
    st.booleans(),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 3]),
)
def test_each_row_belongs_to_one_rank(lengths: list[int], packing: bool, parts: int, multiple_of: int, cp: int) -> None:
    topology = Topology(tp=max(2, multiple_of), cp=cp, sp=True)
    batching = Batching(
        max_tokens=16,
        batch_tokens=40,
        packing=packing,
        multiple_of=topology.sequence_multiple * multiple_of,
        segment_multiple=topology.segment_multiple,
    )
    rows = []
    for microbatch in plan(lengths, batching):
        covered = [token for part in range(cp) for span in spans_of(microbatch, part=part, parts=cp) for token in span]
        assert sorted(covered) == list(range(microbatch.tokens))
        for rank in range(cp):
            for part in range(parts):
                for found in held(
                    microbatch, stripe(microbatch.tokens // cp, part=part, parts=parts), part=rank, parts=cp
                ):
                    rows += range(found.first_row, found.first_row + found.length)
    assert sorted(rows) == list(range(sum(lengths)))


@given(st.lists(st.integers(1, 30), max_size=8), st.booleans(), st.sampled_from([1, 2, 3]))
def test_an_index_is_where_the_row_lies(lengths: list[int], packing: bool, cp: int) -> None:
    """Lays row numbers out as the model is given them, and finds each again."""
    topology = Topology(cp=cp)
    batching = Batching(
        max_tokens=16,
        batch_tokens=40,
        packing=packing,
        multiple_of=topology.sequence_multiple,
        segment_multiple=topology.segment_multiple,
    )
    for microbatch in plan(lengths, batching):
        laid = [[-1] * microbatch.tokens for _ in range(microbatch.sequences)]
        for segment, sequence, offset in microbatch.places():
            laid[sequence][offset : offset + segment.length] = range(
                segment.first_row, segment.first_row + segment.length
            )
        for part in range(cp):
            spans = spans_of(microbatch, part=part, parts=cp)
            local = [[row[token] for span in spans for token in span] for row in laid]
            for found in held(microbatch, range(microbatch.tokens // cp), part=part, parts=cp):
                there = local[found.sequence][found.index : found.index + found.length]
                assert there == list(range(found.first_row, found.first_row + found.length))
