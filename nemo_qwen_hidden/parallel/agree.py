"""Small values between ranks over the control group, and one rank's failure told to all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_qwen_hidden.errors import PeerError
from nemo_qwen_hidden.parallel.groups import ProcessGroups

T = TypeVar("T")


def broadcast_value(value: Any, groups: ProcessGroups) -> Any:
    """Rank 0's value on every rank. Collective over all ranks."""
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=groups.control)
    return box[0]


def wait_for_all(groups: ProcessGroups) -> None:
    """Returns when every rank has come here. Collective over all ranks."""
    dist.barrier(group=groups.control)


def all_values(value: Any, groups: ProcessGroups) -> list[Any]:
    """Every rank's value, by rank, on every rank. Collective over all ranks."""
    values: list[Any] = [None] * groups.topology.world
    dist.all_gather_object(values, value, group=groups.control)
    return values


def gather_values(value: Any, groups: ProcessGroups) -> list[Any]:
    """Every rank's value, by rank, on rank 0; an empty list elsewhere. Collective over all ranks."""
    values: list[Any] | None = [None] * groups.topology.world if groups.place.rank == 0 else None
    dist.gather_object(value, values, group_dst=0, group=groups.control)
    return values or []


def on_rank_0(step: Callable[[], T], groups: ProcessGroups, *, status_of: Callable[[BaseException], int]) -> T:
    """Does ``step`` on rank 0 while the others wait; its value, or its failure, reaches all. Collective over all ranks.

    Raises:
        PeerError: on the other ranks, when ``step`` raised on rank 0, where the error itself is raised.
    """
    if groups.place.rank == 0:
        try:
            value = step()
        except BaseException as error:
            broadcast_value((False, status_of(error)), groups)
            raise
        broadcast_value((True, value), groups)
        return value
    worked, outcome = broadcast_value(None, groups)
    if not worked:
        raise PeerError(outcome)
    result: T = outcome
    return result


def on_every_rank(
    step: Callable[[], T], groups: ProcessGroups, *, status_of: Callable[[BaseException], int]
) -> list[T]:
    """Does ``step`` on each rank; all values, by rank, or the failure of one reach all. Collective over all ranks.

    Raises:
        PeerError: where ``step`` has worked, when it raised on another rank, which raises the error itself.
    """
    try:
        value = step()
    except BaseException as error:
        all_values((False, status_of(error)), groups)
        raise
    outcomes = all_values((True, value), groups)
    failed = [status for worked, status in outcomes if not worked]
    if failed:
        raise PeerError(max(failed))
    return [found for _, found in outcomes]
