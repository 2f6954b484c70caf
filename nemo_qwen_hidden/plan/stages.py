"""Which decoder layers each pipeline stage runs."""

import itertools
from collections.abc import Sequence

from nemo_qwen_hidden.hookpoint import EMBED, FINAL_NORM, HookPoint


def split_layers(num_layers: int, pp: int) -> tuple[range, ...]:
    """Contiguous 0-based layer indices of each of ``pp`` stages; sizes differ by at most one, larger ones first."""
    small, larger = divmod(num_layers, pp)
    stops = [stage * small + min(stage, larger) for stage in range(pp + 1)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(stops))


def stage_of(point: HookPoint, stages: Sequence[range]) -> int:
    """The stage on which ``point`` can be seen; ``final_norm`` is on the last one, ``embed`` on the first."""
    if point.site == EMBED:
        return 0
    if point.site == FINAL_NORM:
        return len(stages) - 1
    return next(stage for stage, layers in enumerate(stages) if point.layer in layers)


def points_of_stage(points: Sequence[HookPoint], stages: Sequence[range], stage: int) -> tuple[HookPoint, ...]:
    """Those of ``points`` that can be seen on ``stage``."""
    return tuple(point for point in points if stage_of(point, stages) == stage)


def last_active_stage(stages: Sequence[range], depth: int) -> int:
    """The deepest stage that has anything to run; stages after it stay idle."""
    return max((stage for stage, layers in enumerate(stages) if layers.start < depth), default=0)
