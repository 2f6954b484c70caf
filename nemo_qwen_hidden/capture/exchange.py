"""What ranks exchange after a microbatch: parts of heads and inner units, keys, and sums over tokens.

n: rows kept, W: numbers in one token's state.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def to_full_width(values: Tensor, rows: Sequence[int], widths: Sequence[int] | None, tp: dist.ProcessGroup) -> Tensor:
    """From a part of the width of all rows to the whole width of this rank's rows. Collective over the tp group.

    Args:
        values: [n of all tp ranks, this rank's part of W], the rows of one tp rank after those of another.
        rows: how many of them each tp rank answers for. widths: part of each tp rank; None: all the same.

    Returns:
        [n of this rank, W], the parts in the order of the ranks, which is Hugging Face's order of heads and units.
    """
    if tp.size() == 1:
        return values
    widths = [values.shape[1]] * tp.size() if widths is None else widths
    mine = rows[tp.rank()]
    # as bytes: gloo's all-to-all was not made for every dtype
    sent = values.contiguous().view(torch.uint8).flatten()
    sent_sizes = [count * widths[tp.rank()] * values.element_size() for count in rows]
    sizes = [mine * width * values.element_size() for width in widths]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, sent_sizes, group=tp)
    parts = zip(received.split(sizes), widths, strict=True)
    return torch.cat([part.view(values.dtype).view(mine, width) for part, width in parts], dim=1)


def gather_tokens(part: Tensor, spans: Sequence[range], cp: dist.ProcessGroup) -> Tensor:
    """The tokens of all context-parallel ranks along the first axis, in the order of the sequence. Collective over cp.

    In training its backward hands each rank the sum of what all of them want for its tokens.

    Args:
        part: [C, ...], this rank's. spans: where tokens lie on the sequence axis, those of the first rank, then those
            of the next.
    """
    if cp.size() == 1:
        return part
    gathered: Tensor = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=cp)
    order = torch.cat([torch.arange(span.start, span.stop) for span in spans]).argsort()
    return gathered[order.to(part.device)]


def sum_over_ranks(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of what each rank has. Collective over the group."""
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return sums
