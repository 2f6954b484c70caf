"""How long a whole job takes, what goes over each link meanwhile, and what binds. Numbers from numbers.

A job reads and tokenizes its data, runs, and seals its shards, one after the other. It runs at the pace of the
slowest of

    a stage of the pipeline    products + memory + tp + cp of a microbatch, one after the other (``plan.cost``), and the
                               exchange of states that tp ranks have parts of
    pp                         sending a state to the next stage
    copy                       states from a rank's device to its machine, in the dtype that they are computed in
    machine                    states from a machine to the storage, in the dtype that they are stored in
    store                      the same of all machines

which all go on at once: each takes (what the busiest carrier has to do) / (its rate), seconds for the whole job. Ranks
write what they hold, so states are shared evenly within a stage, and a stage has those of its own hook points alone;
with pp as the outermost axis one machine may have many and another none. Sealing reads all bytes of the store once more
and hashes them, shared evenly among ranks.

Not counted: starting (importing NeMo and reading weights, tens of seconds), the ends of the pipeline, padding, and
microbatches that are not full. Seconds of products and of exchanges have the sources that ``plan.cost`` names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nemo_qwen_hidden.hookpoint import SPLIT_SITES, HookPoint
from nemo_qwen_hidden.plan.cost import Machine, Work, load_of, spent
from nemo_qwen_hidden.plan.hardware import Host
from nemo_qwen_hidden.plan.shapes import state_width
from nemo_qwen_hidden.plan.stages import points_of_stage
from nemo_qwen_hidden.topology import Topology

BEFORE, IN_TURN, MEANWHILE, AFTER = "before", "in turn", "meanwhile", "after"
"""When something is used: before the run, in it after and before other things, all through it, or after it."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """tokens: that are run. states: of these, those that are stored. window: tokens of the sequence that a token is run
    in, in the mean over tokens; each attends to half of them."""

    tokens: int
    states: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a job asks of one thing, over all of it. amount: flops, bytes or tokens of the busiest carrier, of which
    ``rate`` are done in a second; secs: with what an exchange takes however little it sends."""

    name: str
    carrier: str
    amount: float
    rate: float
    secs: float
    when: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job takes. uses: everything that it asks of something, in the order of the flow."""

    ranks: int
    uses: tuple[Use, ...]
    stored_bytes: int

    def of(self, name: str) -> Use:
        """The use of that name."""
        return next(use for use in self.uses if use.name == name)

    def _secs(self, when: str) -> float:
        return sum(use.secs for use in self.uses if use.when == when)

    @property
    def before_secs(self) -> float:
        """Reading and tokenizing the data."""
        return self._secs(BEFORE)

    @property
    def run_secs(self) -> float:
        """Computing and writing: the longest of what goes on at once."""
        return max([self._secs(IN_TURN), *(use.secs for use in self.uses if use.when == MEANWHILE)])

    @property
    def after_secs(self) -> float:
        """Sealing."""
        return max((use.secs for use in self.uses if use.when == AFTER), default=0.0)

    @property
    def secs(self) -> float:
        return self.before_secs + self.run_secs + self.after_secs

    @property
    def binds(self) -> Use:
        """What more of would save most: the longest use of the longest of the three steps."""
        longest = max((self.run_secs, (IN_TURN, MEANWHILE)), (self.before_secs, (BEFORE,)), (self.after_secs, (AFTER,)))
        if longest[1] == (IN_TURN, MEANWHILE):
            when = IN_TURN if self._secs(IN_TURN) >= self.run_secs else MEANWHILE
            longest = (self.run_secs, (when,))
        return max((use for use in self.uses if use.when in longest[1]), key=lambda use: use.secs)

    def pace(self, use: Use) -> float:
        """Of what is used, how much a second while it is used: bytes per second of a link."""
        secs = {BEFORE: self.before_secs, AFTER: self.after_secs}.get(use.when, self.run_secs)
        return use.amount / secs if secs else 0.0

    @property
    def rank_hours(self) -> float:
        """Hours of all ranks, which wait while data are tokenized and shards sealed."""
        return self.ranks * self.secs / 3600


def estimate(
    topology: Topology,
    stages: Sequence[range],
    work: Work,
    machine: Machine,
    host: Host,
    corpus: Corpus,
    *,
    state_bytes: Callable[[HookPoint], int],
    to_rank_0: bool = False,
) -> Estimate:
    """What a job takes in this layout.

    Args:
        stages: layer indices of each stage.
        state_bytes: of one state of a hook point, as it is stored.
        to_rank_0: whether rank 0 writes all states, and the others send theirs.
    """
    world, states = topology.world, corpus.states
    stored = [states * bytes_ for bytes_ in _of_ranks(topology, stages, work.points, state_bytes)]
    computed = [states * bytes_ for bytes_ in _of_ranks(topology, stages, work.points, lambda at: _width(at, work))]
    computed = [numbers * work.itemsize for numbers in computed]
    total = sum(stored)
    uses = [_use("tokenize", "one process", corpus.tokens, host.tokenize, BEFORE)]
    uses += _steps(topology, stages, work, machine, corpus)
    if topology.tp > 1 and any(point.site in SPLIT_SITES for point in work.points):
        parts = _of_ranks(topology, stages, work.points, lambda at: _width(at, work) if at.site in SPLIT_SITES else 0)
        sent = states * max(parts) * work.itemsize * (topology.tp - 1) / topology.tp
        uses.append(_use("states over tp", "each rank", sent, machine.link(topology.tp, world), IN_TURN))
    uses.append(_use("copy", "a rank", max(computed), host.copy, MEANWHILE))
    if to_rank_0:
        uses.append(_use("to rank 0", "rank 0", sum(computed) - computed[0], machine.link(world, world), IN_TURN))
        stored = [float(total), *(0.0 for _ in stored[1:])]
    each = machine.per_machine
    machines = [sum(stored[first : first + each]) for first in range(0, world, each)]
    uses.append(_use("machine", "a machine", max(machines), host.machine, MEANWHILE))
    uses.append(_use("store", "the storage", total, host.store, MEANWHILE))
    sealing = 1 if to_rank_0 else world
    uses.append(_use("seal", "each rank", total / sealing, host.seal, AFTER))
    uses.append(_use("seal: machine", "a machine", total * min(each, sealing) / sealing, host.machine, AFTER))
    uses.append(_use("seal: store", "the storage", total, host.store, AFTER))
    return Estimate(ranks=world, uses=tuple(uses), stored_bytes=round(total))


def _use(name: str, carrier: str, amount: float, rate: float, when: str) -> Use:
    return Use(name=name, carrier=carrier, amount=amount, rate=rate, secs=amount / rate, when=when)


def _steps(topology: Topology, stages: Sequence[range], work: Work, machine: Machine, corpus: Corpus) -> list[Use]:
    """What the rank with most layers does and sends for the tokens of one replica, in full microbatches."""
    typical = replace(work, max_tokens=corpus.window)
    layers = max(sum(len(layers) for layers in stages[first :: topology.pp]) for first in range(topology.pp))
    load = load_of(topology, typical, layers=layers)
    each = spent(load, topology, machine)
    microbatches = corpus.tokens / typical.tokens / topology.dp
    world = topology.world
    rows = (
        ("products", load.flops, machine.rank_flops(world), each.products, IN_TURN),
        ("memory", load.moved, machine.rank_memory(world), each.memory, IN_TURN),
        ("tp", load.tp, machine.link(topology.tp, world), each.tp, IN_TURN),
        ("cp", load.cp, machine.link(topology.tp * topology.cp, world), each.cp, IN_TURN),
        ("pp", load.pp, machine.link(world, world), each.pp, MEANWHILE),
    )
    return [
        Use(name=name, carrier="a rank", amount=n * microbatches, rate=rate, secs=secs * microbatches, when=when)
        for name, n, rate, secs, when in rows
        if n
    ]


def _of_ranks(
    topology: Topology, stages: Sequence[range], points: Sequence[HookPoint], size: Callable[[HookPoint], int]
) -> list[float]:
    """Of each rank, its part of the sizes of one token's states, in the mean over tokens."""
    sharing = topology.tp * topology.cp * topology.dp
    of_stage = [sum(map(size, points_of_stage(points, stages, stage))) for stage in range(len(stages))]
    of_pp = [sum(of_stage[first :: topology.pp]) / sharing for first in range(topology.pp)]
    return [of_pp[topology.at(rank).pp] for rank in range(topology.world)]


def _width(point: HookPoint, work: Work) -> int:
    return state_width(point, work.shape, keys=work.max_tokens, heads=work.heads)
