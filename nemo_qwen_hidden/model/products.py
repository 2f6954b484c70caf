"""Products of a CPU without gradients, in blocks of rows that stay in its cache.

T: tokens (sequences laid end to end), K: numbers of a token that go in, O: numbers that come out.

A CPU without units for bf16 or fp16 multiplies in them at a seventh of its speed in fp32 (``benchmarks/README.md``).
There inputs and weights are widened to fp32, and each output is rounded once: the same sums with less error.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_qwen_hidden.plan.footprint import MLP_ROWS


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU computes products of ``dtype``: itself, or fp32."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


def blocks(rows: int) -> Iterator[slice]:
    """``MLP_ROWS`` at a time: what a gated MLP of Qwen2.5-0.5B has between its products is then 20 MB."""
    return (slice(start, min(start + MLP_ROWS, rows)) for start in range(0, rows, MLP_ROWS))


def multiply(inputs_TK: Tensor, weight_OK: Tensor, bias_O: Tensor | None) -> Tensor:
    """[T, O]: the inputs times the transposed weights, plus the bias."""
    out_TO = inputs_TK.new_empty(len(inputs_TK), len(weight_OK))
    work = working_dtype(out_TO.dtype)
    weight_OK, bias_O = weight_OK.to(work), None if bias_O is None else bias_O.to(work)
    for rows in blocks(len(inputs_TK)):
        multiply_into(out_TO[rows], inputs_TK[rows].to(work), weight_OK, bias_O)
    return out_TO


def multiply_into(out_TO: Tensor, inputs_TK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> None:
    """As ``multiply``, of a block; all but ``out_TO`` in the working dtype."""
    wide_TO = out_TO if out_TO.dtype == inputs_TK.dtype else torch.empty_like(out_TO, dtype=inputs_TK.dtype)
    if bias_O is None:
        torch.mm(inputs_TK, weight_OK.t(), out=wide_TO)
    else:
        torch.addmm(bias_O, inputs_TK, weight_OK.t(), out=wide_TO)
    if wide_TO is not out_TO:
        out_TO.copy_(wide_TO)


def swiglu(inputs_TK: Tensor, weight_OK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Of each block of rows, which they are, and ``silu(gate) * up`` [rows, O / 2] in the inputs' dtype; gate and up
    are the halves of the inputs times the transposed weights (https://arxiv.org/abs/2002.05202). A block is good until
    the next is asked for.

    They are computed as [O, rows]: so each half is contiguous, and MKL is a tenth faster where far more numbers come
    out than go in.
    """
    dtype, work = inputs_TK.dtype, working_dtype(inputs_TK.dtype)
    weight_OK = weight_OK.to(work)
    space = weight_OK.new_empty(len(weight_OK) * min(MLP_ROWS, len(inputs_TK)))
    for rows in blocks(len(inputs_TK)):
        inputs = inputs_TK[rows].to(work)
        both = space[: len(weight_OK) * len(inputs)].view(len(weight_OK), len(inputs))
        gate, up = torch.mm(weight_OK, inputs.t(), out=both).chunk(2)
        yield rows, F.silu(gate, inplace=True).mul_(up).to(dtype).t()
