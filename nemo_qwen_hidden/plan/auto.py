"""Which layout a model is run in: the fastest of those that fit the memory of a rank, and why.

Of layouts that are as fast, the one with fewer ranks, then the smaller tp, then the smaller pp. Virtual stages are
never chosen: they fill the gaps of a schedule with a flush, and there is none. cp is used only where nothing fits
without it: it is the one axis that divides a single sequence, and none is needed for speed while dp has documents.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nemo_qwen_hidden.errors import ConfigError, UserError
from nemo_qwen_hidden.plan.cost import Machine, Need, Work, need_of, secs_of
from nemo_qwen_hidden.plan.stages import stages_of
from nemo_qwen_hidden.topology import Topology, model_problems

AXES = ("tp", "pp", "cp", "dp")
FILLED = 0.9  # of a rank's memory; the rest is for the allocator, kernels and communication
GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Option:
    """A layout that the model can run in. total: bytes of a rank with the program. secs: for one microbatch of each
    replica, divided by the replicas."""

    topology: Topology
    need: Need
    total: int
    fits: bool
    secs: float

    @property
    def rounded_secs(self) -> float:
        """To three digits: the estimate tells no more."""
        return float(f"{self.secs:.3g}")

    @property
    def preference(self) -> tuple[float, ...]:
        """The smaller, the better."""
        at = self.topology
        return (self.rounded_secs, at.world, at.tp, at.pp, at.cp, at.sp)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A neighbour of the chosen layout. need_bytes: what it would need of a rank. times: its time as a multiple of the
    chosen one's. Both None where the model cannot run in it."""

    topology: Topology
    need_bytes: int | None
    times: float | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layout; the reasons, each with what it is about; and the neighbours, which differ by a factor of one axis or
    two."""

    topology: Topology
    reasons: tuple[tuple[str, str], ...]
    rejected: tuple[Rejected, ...]


def choose(work: Work, machine: Machine) -> Choice:
    """The layout to run ``work`` in.

    Raises:
        ConfigError: no layout fits; says how much memory is missing in the one that misses least.
    """
    options = tuple(_options(work, machine, with_cp=False))
    if not any(option.fits for option in options):
        options += tuple(_options(work, machine, with_cp=True))
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise _too_large(options, machine)
    chosen = min(fitting, key=lambda option: option.preference)
    return Choice(
        topology=chosen.topology,
        reasons=tuple(_reasons(chosen, machine)),
        rejected=tuple(_rejected(chosen, work, machine)),
    )


def _options(work: Work, machine: Machine, *, with_cp: bool) -> Iterator[Option]:
    """Those that use cp, or those that do not."""
    for world in machine.worlds:
        for tp, pp, cp in _factors(world):
            for sp in _sp_choices(tp, machine) if (cp > 1) == with_cp else ():
                topology = Topology(tp=tp, pp=pp, cp=cp, dp=world // (tp * pp * cp), sp=sp)
                if not _problems(topology, work, machine):
                    yield _option(topology, work, machine)


def _sp_choices(tp: int, machine: Machine) -> tuple[bool, ...]:
    """On a CPU sp saves nothing: gloo keeps what it gathers and scatters longer than the layer needs it."""
    return (False, True) if tp > 1 and not machine.shared_cores else (False,)


def _factors(world: int) -> Iterator[tuple[int, int, int]]:
    """Sizes of tp, pp and cp whose product divides ``world``."""
    for tp in _divisors(world):
        for pp in _divisors(world // tp):
            for cp in _divisors(world // tp // pp):
                yield tp, pp, cp


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _problems(topology: Topology, work: Work, machine: Machine) -> list[UserError]:
    shape = work.shape
    problems = model_problems(
        topology,
        num_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
    )
    try:
        stages_of(work.layers, pp=topology.pp)
    except ConfigError as problem:
        problems.append(problem)
    if not machine.keeps_together(topology.tp, topology.world):
        rule = f"must divide the ranks of a machine ({machine.per_machine})"
        problems.append(ConfigError("parallel.tp", rule, topology.tp))
    return problems


def _option(topology: Topology, work: Work, machine: Machine) -> Option:
    need, bound = need_of(topology, work), FILLED * machine.rank_bytes(topology.world)
    total = need.total + machine.base_bytes
    return Option(topology=topology, need=need, total=total, fits=total <= bound, secs=secs_of(topology, work, machine))


def _too_large(options: Sequence[Option], machine: Machine) -> ConfigError:
    def missing(option: Option) -> float:
        return option.total / FILLED - machine.rank_bytes(option.topology.world)

    least = min(options, key=lambda option: (missing(option), option.preference))
    need, most = least.need, machine.worlds[-1]
    ranks = "one rank" if most == 1 else f"{'up to ' if machine.world is None else ''}{most} ranks"
    rule = (
        f"must be at least {_up(least.total / FILLED)} for this model on {ranks}: {_up(missing(least))} GB a rank are "
        f"missing in the nearest layout, {least.topology}, where weights take {_gb(need.weights)} GB, the program "
        f"{_gb(machine.base_bytes)} GB, and what grows with `data.max_tokens` and `data.batch_tokens` "
        f"{_gb(need.activations + need.states)} GB"
    )
    return ConfigError("parallel.memory_gb", rule, float(_gb(machine.rank_bytes(least.topology.world))))


def _gb(number: float) -> str:
    return f"{number / GB:.1f}" if number >= GB / 10 else f"{number / GB:.1g}"


def _up(number: float) -> str:
    """GB, rounded up to three digits: what is asked for is enough."""
    unit = 10.0 ** (math.floor(math.log10(number / GB)) - 2)
    return f"{math.ceil(number / GB / unit) * unit:.4g}"


def _reasons(chosen: Option, machine: Machine) -> Iterator[tuple[str, str]]:
    at, need = chosen.topology, chosen.need
    there = f"{at.world} started" if machine.world is not None else f"{at.world} of up to {machine.per_machine} here"
    yield "ranks", f"{there}, {_gb(machine.rank_bytes(at.world))} GB each, of which {FILLED:.0%} may be filled"
    yield (
        "memory",
        f"{_gb(chosen.total)} GB: weights {_gb(need.weights)}, activations {_gb(need.activations)}, "
        f"states {_gb(need.states)}, program {_gb(machine.base_bytes)}",
    )
    for axis in AXES:
        if getattr(at, axis) > 1:
            yield f"{axis}={getattr(at, axis)}", _WHY[axis]
    if at.sp:
        yield "sp", _WHY["sp"]
    if at.world == 1 and machine.shared_cores:
        yield "one rank", "computes on all cores; more would share them, and the memory"


_WHY = {
    "tp": "divides each layer, for two all-reduces a layer",
    "pp": "divides the layers; sends one state a microbatch, while it computes",
    "cp": "divides a single sequence; nothing fits without that",
    "dp": "sends nothing, so it gets all ranks that the model leaves free",
    "sp": "divides the tokens between layers; it does not fit without that",
}


def _rejected(chosen: Option, work: Work, machine: Machine) -> Iterator[Rejected]:
    for topology in _neighbours(chosen.topology, machine):
        problems = _problems(topology, work, machine)
        if problems:
            setting = problems[0].setting.removeprefix("parallel.")
            yield Rejected(topology=topology, need_bytes=None, times=None, why=f"{setting} {problems[0].rule}")
            continue
        option = _option(topology, work, machine)
        why = _why_not(option, chosen, machine)
        times = option.secs / chosen.secs
        yield Rejected(topology=topology, need_bytes=option.total, times=times, why=why)


def _why_not(option: Option, chosen: Option, machine: Machine) -> str:
    over = option.total - FILLED * machine.rank_bytes(option.topology.world)
    if not option.fits:
        return f"{_up(over)} GB too much"
    if option.topology.cp > 1 and chosen.topology.cp == 1:
        return "cp is for what does not fit without it"
    if option.rounded_secs > chosen.rounded_secs:
        return "slower"
    return "no faster, with more ranks" if option.topology.world > chosen.topology.world else "no faster, sends more"


def _neighbours(at: Topology, machine: Machine) -> Iterator[Topology]:
    """Each layout once that differs by sp, or by a prime factor that is moved from one axis to another or, where the
    number of ranks is free, taken from an axis or given to one."""
    found: dict[Topology, None] = {}
    for sizes in _moves({axis: getattr(at, axis) for axis in AXES}):
        world = sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"]
        if world in machine.worlds:
            found[Topology(**sizes, sp=at.sp and sizes["tp"] > 1)] = None
    if len(_sp_choices(at.tp, machine)) > 1:
        found[replace(at, sp=not at.sp)] = None
    yield from found


def _moves(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    for source in AXES:
        for factor in _prime_factors(sizes[source]):
            fewer = {**sizes, source: sizes[source] // factor}
            yield fewer
            yield from ({**fewer, to: fewer[to] * factor} for to in AXES if to != source)
    yield from ({**sizes, axis: sizes[axis] * 2} for axis in AXES)


def _prime_factors(number: int) -> list[int]:
    """Each prime that divides ``number``, once."""
    return [factor for factor in _divisors(number) if len(_divisors(factor)) == 2]
