"""A fine-tuning run as integers: steps, sequences, the pipeline's schedule.

The schedules are Megatron-Core's: 1F1B, and with virtual stages 1F1B interleaved (``pipeline_parallel/schedules.py``).
"""

import math
from collections.abc import Iterator, Sequence

from nemo_qwen_hidden.topology import Topology


def microbatches_of(topology: Topology, *, global_batch_size: int, micro_batch_size: int) -> int:
    """That each replica runs in a step."""
    return global_batch_size // (micro_batch_size * topology.dp)


def bubble(topology: Topology, microbatches: int) -> float:
    """Time that a rank of the pipeline waits in a step, as a multiple of the time that it works: (pp - 1) / (vp m), for
    stages that take the same time (Narayanan et al. 2021, arXiv 2104.04473, sections 2.2.1 and 2.2.2)."""
    return (topology.pp - 1) / (topology.vp * microbatches)


def idle(topology: Topology, microbatches: int) -> float:
    """The part of a step, from 0 to 1, in which a rank of the pipeline waits: b / (1 + b) of the ``bubble`` b."""
    waits = bubble(topology, microbatches)
    return waits / (1 + waits)


def passes(topology: Topology, rank: int, microbatches: int) -> Iterator[tuple[bool, int]]:
    """What pipeline rank ``rank`` does in a step, one after the other: whether it is a forward pass, and through which
    of its ``vp`` model chunks.

    As ``get_schedule_table`` and ``get_pp_rank_microbatches`` of megatron-core 0.16.1 have it, with groups of ``pp``
    microbatches for each chunk.
    """
    pp, vp = topology.pp, topology.vp
    groups = range(0, microbatches, pp) if vp > 1 else (0,)
    sizes = (min(pp, microbatches - first) if vp > 1 else microbatches for first in groups)
    forward = [chunk for size in sizes for chunk in range(vp) for _ in range(size)]
    ahead = pp - rank - 1 if vp == 1 else 2 * (pp - rank - 1) + (vp - 1) * pp
    ahead = min(ahead, len(forward))
    yield from ((True, chunk) for chunk in forward[:ahead])
    for number, chunk in enumerate(forward[ahead:]):
        yield True, chunk
        yield False, vp - 1 - forward[number]
    yield from ((False, vp - 1 - chunk) for chunk in forward[len(forward) - ahead :])


def most_held(topology: Topology, rank: int, microbatches: int, chunk_bytes: Sequence[int]) -> int:
    """Bytes that are held at once at most between forward and backward passes, where a microbatch that has gone forward
    through chunk n of the rank holds ``chunk_bytes[n]`` until it has gone back."""
    held = most = 0
    for forward, chunk in passes(topology, rank, microbatches):
        held += chunk_bytes[chunk] if forward else -chunk_bytes[chunk]
        most = max(most, held)
    return most


def held_out(documents: int, part: float) -> int:
    """Documents, of the last, that are kept for validation."""
    return math.ceil(part * documents)


def sequences_of(tokens: int, seq_length: int) -> int:
    """Sequences that so many tokens are cut into, each with the token that follows it; a rest is not used."""
    return max(0, (tokens - 1) // seq_length)


def steps_of(first: int, last: int, every: int) -> range:
    """Multiples of ``every`` from ``first`` to ``last``, both included."""
    return range(-(-first // every) * every, last + 1, every)
