"""From a mask over a batch of ragged sequences to the rows that are kept, or to what they weigh in a mean."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nemo_qwen_hidden.capture.rows import Choice
from nemo_qwen_hidden.config import MEANS
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.plan.pooling import weights

POOLS = ("last", *MEANS)


def choice_of(lengths: Sequence[int], mask: Tensor | None, pool: str | None, *, tokens: int) -> Choice | None:
    """What ``mask`` and ``pool`` keep of the rows of a batch; a row is the token's number among all of its tokens.

    Args:
        lengths: tokens of each sequence. mask: bool [batch, tokens], None for all. pool: None or one of ``POOLS``.

    Raises:
        ConfigError: a mask of another shape or dtype, or another way of pooling.
    """
    if pool is not None and pool not in POOLS:
        raise ConfigError("pool", f"must be one of {', '.join(POOLS)}", pool)
    if mask is None and pool is None:
        return None
    if mask is None:
        mask = torch.ones(len(lengths), tokens, dtype=torch.bool)
    if mask.shape != (len(lengths), tokens) or mask.dtype != torch.bool:
        rule = f"must be bool of shape [batch, tokens], {[len(lengths), tokens]}"
        raise ConfigError("mask", rule, f"{mask.dtype} {list(mask.shape)}")
    flat = torch.cat([mask[index, :length].cpu() for index, length in enumerate(lengths)])
    if pool is None:
        return Choice(kept=lambda row, length: flat[row : row + length].nonzero()[:, 0].tolist())
    starts = list(accumulate(lengths, initial=0))[:-1]

    def weights_at(row: int, length: int) -> Tensor | None:
        position = row - starts[bisect_right(starts, row) - 1]
        return weights_of(flat[row : row + length], pool, position)

    return Choice(weights=weights_at)


def weights_of(kept: Tensor, pool: str, position: int = 0) -> Tensor | None:
    """fp32 [n]: what each of n tokens weighs in the state of their sequence, 0 where ``kept`` (bool [n]) is false.
    Their sum is 1; None where nothing is kept. position: of the first of them in its document."""
    places = kept.nonzero()[:, 0]
    if not len(places):
        return None
    found = torch.zeros(len(kept))
    if pool == "last":
        found[places[-1]] = 1
    else:
        found[places] = torch.from_numpy(weights(pool, (places + position).numpy())).float()
    return found
