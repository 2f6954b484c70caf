"""Names, shard arithmetic, sizes for people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.store.format import HOOK_POINT_NAME, SHARD_FILES, TOKEN_FILES, ShardGrid, human_bytes, shard_name

GRIDS = st.builds(ShardGrid, st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=4))


@given(GRIDS)
def test_shards_cut_all_rows_in_order(grid: ShardGrid) -> None:
    rows = [row for shard in range(grid.shards) for row in grid.states_of(shard)]
    assert rows == list(range(grid.states))
    assert all(row in grid.states_of(grid.shard_of(row)) for row in rows)
    assert list(grid.starts) == [0, *(grid.states_of(shard).stop for shard in range(grid.shards))]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=4))
def test_each_part_is_cut_by_itself(parts: list[tuple[int, int]]) -> None:
    grid, row = ShardGrid(parts), 0
    for number, (rows, shard_rows) in enumerate(parts):
        alone = ShardGrid([(rows, shard_rows)])
        shards = grid.of_part(number)
        assert [len(grid.states_of(shard)) for shard in shards] == [
            len(alone.states_of(k)) for k in range(alone.shards)
        ]
        assert all(len(grid.states_of(shard)) == shard_rows for shard in shards[:-1])
        assert all(grid.part_of(shard) == number for shard in shards)
        assert not shards or grid.states_of(shards[0]).start == row
        row += rows


@given(GRIDS, st.data())
def test_pieces_stay_in_their_shards(grid: ShardGrid, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, grid.states))
    length = data.draw(st.integers(0, grid.states - first))
    pieces = list(grid.pieces(first, length))
    assert [row + i for _, row, size in pieces for i in range(size)] == list(range(first, first + length))
    for shard, row, size in pieces:
        assert size > 0 and {row, row + size - 1} <= set(grid.states_of(shard))
    assert len({shard for shard, _, _ in pieces}) == len(pieces)


def test_ten_rows_in_shards_of_four() -> None:
    grid = ShardGrid([(10, 4)])
    assert [grid.states_of(shard) for shard in range(grid.shards)] == [range(0, 4), range(4, 8), range(8, 10)]
    assert list(grid.pieces(3, 6)) == [(0, 3, 1), (1, 4, 4), (2, 8, 1)]


@pytest.mark.parametrize(("rows", "shard_rows"), [(-1, 5), (5, 0)])
def test_no_such_grid(rows: int, shard_rows: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        ShardGrid([(rows, shard_rows)])


def test_what_is_outside_is_an_error() -> None:
    grid = ShardGrid([(10, 4)])
    with pytest.raises(ValueError, match="shard 3 is not one of 3"):
        grid.states_of(3)
    with pytest.raises(ValueError, match="state 10 is not one of 10"):
        grid.shard_of(10)
    with pytest.raises(ValueError, match="state 10 is not one of 10"):
        list(grid.pieces(8, 3))


def test_names() -> None:
    assert [shard_name(number) for number in (0, 12, 1_234_567)] == [
        "000000.safetensors",
        "000012.safetensors",
        "1234567.safetensors",
    ]
    for name in ("000000.safetensors", "1234567.safetensors.partial"):
        assert SHARD_FILES.fullmatch(name)
    for name in ("00000.safetensors", "000000.safetensors.bak", "x000000.safetensors", "000000.safetensors\n"):
        assert not SHARD_FILES.fullmatch(name)
    for name in ("000000.safetensors", "000000.documents.jsonl.tmp", "000000.token_id.tmp"):
        assert TOKEN_FILES.fullmatch(name)
    assert not TOKEN_FILES.fullmatch("000000.notes.txt")
    assert [bool(HOOK_POINT_NAME.fullmatch(name)) for name in ("embed", "attn_out@12", "a@01", "../a", "a@")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (1_540_000_000, "1.5 GB"),
        (2 * 10**12, "2.0 TB"),
        (3 * 10**16, "30.0 PB"),
    ],
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text
