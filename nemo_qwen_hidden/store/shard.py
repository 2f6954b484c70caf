"""What a shard file says of itself, known before there is data."""

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import norm_of
from nemo_qwen_hidden.store.format import Dtype
from nemo_qwen_hidden.store.header import Header, TensorSpec, build_header


def shard_header(point: HookPoint, rows: range, *, hidden_size: int, dtype: Dtype) -> tuple[bytes, Header]:
    """The first bytes of the shard that holds ``rows`` of ``point``, and what they say."""
    metadata = {
        "hook_point": str(point),
        "first_row": str(rows.start),
        "rows": str(len(rows)),
        "norm": norm_of(point),
    }
    return build_header({str(point): TensorSpec(dtype=dtype.safetensors, shape=(len(rows), hidden_size))}, metadata)
