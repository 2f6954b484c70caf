"""What a shard file holds, known before there is data.

    resid_post@12        [rows, H] in the stored dtype
    scale                fp32 [rows], of int8 alone: a row's values are its numbers times its scale
    divisor              fp32 [rows], of states after the final norm: what the norm divided each row by
    statistics.moments   int64 [4, H]
    statistics.norms     int32 [statistics.BINS]

The values come first, so that a row lies at a fixed offset. Header: see ``header``.
"""

from nemo_qwen_hidden.hookpoint import RESID_POST, HookPoint
from nemo_qwen_hidden.store.entries import norm_of
from nemo_qwen_hidden.store.format import Dtype, Shard
from nemo_qwen_hidden.store.header import Header, TensorSpec, build_header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.statistics import BINS

SCALE, DIVISOR, MOMENTS, NORMS = "scale", "divisor", "statistics.moments", "statistics.norms"


def shard_header(
    point: HookPoint, *, part: str, first_row: int, rows: int, hidden_size: int, dtype: Dtype, divisor: bool = False
) -> tuple[bytes, Header]:
    """The first bytes of a shard, and what they say.

    Args:
        part: SHA-256 of the token table of the shard's part. first_row: counted in that part. divisor: whether it has
            one for each row.
    """
    metadata = {
        "hook_point": str(point),
        "norm": norm_of(point),
        "part": part,
        "first_row": str(first_row),
        "rows": str(rows),
    }
    tensors = {str(point): TensorSpec(dtype=dtype.safetensors, shape=(rows, hidden_size))}
    if dtype.scaled:
        tensors[SCALE] = TensorSpec(dtype="F32", shape=(rows,))
    if divisor:
        tensors[DIVISOR] = TensorSpec(dtype="F32", shape=(rows,))
    tensors[MOMENTS] = TensorSpec(dtype="I64", shape=(4, hidden_size))
    tensors[NORMS] = TensorSpec(dtype="I32", shape=(BINS,))
    return build_header(tensors, metadata)


def shard_bytes(rows: int, *, hidden_size: int, dtype: Dtype, divisor: bool) -> int:
    """Bytes of a shard of this many rows; some more or less where numbers or names are long."""
    return shard_header(
        HookPoint(RESID_POST, 10),
        part="0" * 64,
        first_row=0,
        rows=rows,
        hidden_size=hidden_size,
        dtype=dtype,
        divisor=divisor,
    )[1].size_bytes


def header_of(shard: Shard, target: Manifest) -> tuple[bytes, Header]:
    """The first bytes of one shard of a store, and what they say."""
    point, number = shard
    rows, part = target.grid.rows_of(number), target.part_of(number)
    return shard_header(
        point,
        part=part.tokens.sha256,
        first_row=rows.start - part.first_row,
        rows=len(rows),
        hidden_size=target.hidden_size,
        dtype=target.dtype,
        divisor=target.entry(point).divisor,
    )
