"""What a shard file holds, known before there is data.

    resid_post@12        [states, width] in the stored dtype
    scale                fp32 [states], of int8 alone: a state's values are its numbers times its scale
    divisor              fp32 [states], of those after the final norm: what the norm divided each by
    statistics.moments   int64 [4, width]
    statistics.norms     int32 [statistics.BINS]

The values come first, so that a state lies at a fixed offset. Header: see ``header``.
"""

from nemo_qwen_hidden.hookpoint import RESID_POST, HookPoint
from nemo_qwen_hidden.store.entries import norm_of
from nemo_qwen_hidden.store.format import Dtype, Shard
from nemo_qwen_hidden.store.header import Header, TensorSpec, build_header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.statistics import BINS

SCALE, DIVISOR, MOMENTS, NORMS = "scale", "divisor", "statistics.moments", "statistics.norms"


def shard_header(
    point: HookPoint, *, part: str, first_row: int, rows: int, width: int, dtype: Dtype, divisor: bool = False
) -> tuple[bytes, Header]:
    """The first bytes of a shard, and what they say.

    Args:
        part: SHA-256 of the token table of the shard's part. first_row, rows: its states, counted in that part. width:
            numbers in a state. divisor: whether it has one for each state.
    """
    metadata = {
        "hook_point": str(point),
        "norm": norm_of(point),
        "part": part,
        "first_row": str(first_row),
        "rows": str(rows),
    }
    tensors = {str(point): TensorSpec(dtype=dtype.safetensors, shape=(rows, width))}
    if dtype.scaled:
        tensors[SCALE] = TensorSpec(dtype="F32", shape=(rows,))
    if divisor:
        tensors[DIVISOR] = TensorSpec(dtype="F32", shape=(rows,))
    tensors[MOMENTS] = TensorSpec(dtype="I64", shape=(4, width))
    tensors[NORMS] = TensorSpec(dtype="I32", shape=(BINS,))
    return build_header(tensors, metadata)


def shard_bytes(rows: int, *, width: int, dtype: Dtype, divisor: bool) -> int:
    """Bytes of a shard of this many states; some more or less where numbers or names are long."""
    return shard_header(
        HookPoint(RESID_POST, 10),
        part="0" * 64,
        first_row=0,
        rows=rows,
        width=width,
        dtype=dtype,
        divisor=divisor,
    )[1].size_bytes


def state_bytes(width: int, *, dtype: Dtype, divisor: bool) -> int:
    """Bytes that a shard grows by with each state."""
    return width * dtype.bytes + 4 * dtype.scaled + 4 * divisor


def header_of(shard: Shard, target: Manifest) -> tuple[bytes, Header]:
    """The first bytes of one shard of a store, and what they say."""
    point, number = shard
    states, index, entry = target.grid.states_of(number), target.grid.part_of(number), target.entry(point)
    return shard_header(
        point,
        part=target.parts[index].tokens.sha256,
        first_row=states.start - target.first_states[index],
        rows=len(states),
        width=entry.width,
        dtype=target.dtype,
        divisor=entry.divisor,
    )
