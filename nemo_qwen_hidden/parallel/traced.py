"""Recording on every rank, and one file of it all."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nemo_qwen_hidden.errors import status_of
from nemo_qwen_hidden.parallel.agree import all_values, broadcast_value, gather_values, on_rank_0
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.topology import Place
from nemo_qwen_hidden.trace.record import UNTRACED, Clock, Recorder, Trace, zero_of
from nemo_qwen_hidden.trace.whole import clear_place, writing

GATHERED_BYTES = 2**20


@contextmanager
def traced(path: Path | None, groups: ProcessGroups) -> Iterator[Trace]:
    """While entered, this rank records; rank 0 writes what all have recorded to ``path`` when the block has ended well
    on every rank. None: nothing is recorded. Collective over all ranks, on entering and on leaving.

    Time 0 is that of rank 0. Ranks of one machine share a clock; those of another are brought to it by unix time, so
    that between machines spans are off by as much as their clocks.

    Raises:
        ConfigError: on rank 0, the file cannot be written.
    """
    if path is None:
        yield UNTRACED
        return
    on_rank_0(lambda: clear_place(path), groups, status_of=status_of)
    place, clock = groups.place, Clock.now()
    zero_ns = zero_of(clock.machine, all_values(clock, groups))
    with Recorder(rank=place.rank, label=label_of(place), zero_ns=zero_ns) as recorder:
        yield recorder
        recorder.rewind()
        _gather(recorder, path, groups)


def label_of(place: Place) -> str:
    """Such as ``rank 3: tp=1 pp=0 cp=0 dp=1``, of the axes that have more than one rank."""
    topology = place.topology
    sizes = {"tp": topology.tp, "pp": topology.pp, "cp": topology.cp, "dp": topology.dp}
    where = " ".join(f"{axis}={getattr(place, axis)}" for axis, size in sizes.items() if size > 1)
    return f"rank {place.rank}: {where}" if where else f"rank {place.rank}"


def _gather(recorder: Recorder, path: Path, groups: ProcessGroups) -> None:
    """Some of every rank's lines at a time, to rank 0. Collective over all ranks."""
    with ExitStack() as stack:
        write = stack.enter_context(writing(path)) if groups.place.rank == 0 else None
        more = True
        while more:
            lines = gather_values(recorder.lines(GATHERED_BYTES), groups)
            if write is not None:
                write(b"".join(lines))
            more = broadcast_value(any(lines), groups)
