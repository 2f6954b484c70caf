"""What a layout costs: bytes of a rank, and seconds of a microbatch.

A replica takes for a microbatch what its slowest stage takes:

    layers x (products / flops + moved / memory + two all-reduces / link + gathered keys and values / link)

each of what a rank does of it, or, where that is longer, sending one state to the next stage, which happens while it
computes. Filling the pipeline is not counted: it has no flush, and a corpus has many microbatches. Products are two
per weight and token, and four per token, key and unit of the heads, of which the causal mask leaves half (Kaplan et
al. 2020). Moved to and from memory are a layer's weights once, and twice what it has alive at its widest: written and
read. In an all-reduce each of n ranks sends 2(n-1)/n of its bytes, in an all-gather (n-1)/n (Patarasuk and Yuan 2009);
under sp a gather and a scatter take the place of the all-reduce. So dp costs nothing, pp next to nothing where it
divides the layers, and tp two all-reduces a layer. What all of a job takes is in ``plan.scaling``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from nemo_qwen_hidden.hookpoint import SPLIT_SITES, HookPoint
from nemo_qwen_hidden.plan.footprint import (
    DecoderShape,
    activation_bytes,
    gathered_bytes,
    layer_parameters,
    travelling_bytes,
    weight_bytes,
)
from nemo_qwen_hidden.plan.shapes import state_width
from nemo_qwen_hidden.plan.stages import points_of_stage, split_layers, stage_of
from nemo_qwen_hidden.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Work:
    """What has to be run.

    layers: decoder layers that run. batch_tokens: tokens of a microbatch at the most. max_tokens: of one sequence.
    itemsize: bytes of a weight or activation. heads: whose attention weights are taken; None is all. mlp_rows: that an
    MLP takes at a time; None is all.
    """

    shape: DecoderShape
    layers: int
    points: tuple[HookPoint, ...]
    batch_tokens: int
    max_tokens: int
    itemsize: int
    heads: tuple[int, ...] | None = None
    mlp_rows: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the largest microbatch: a sequence that is longer than a batch is run by itself."""
        return max(self.batch_tokens, self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """flops: per second, of a rank's products. memory: bytes that it reads or writes of its memory per second. near,
    far: bytes that it sends per second within its machine and to another; latency: seconds that an exchange takes
    however little it sends. Only their proportions decide on a layout."""

    flops: float
    memory: float
    near: float
    far: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it is to run.

    world: ranks that a launcher has started; None where up to ``per_machine`` can be, on this machine alone.
    per_machine: ranks on one machine. memory_bytes: of each rank, or of the machine if ``shared_memory``. base_bytes:
    what a rank holds before it has a model. shared_cores: whether a machine's ranks divide ``speeds.flops`` and
    ``speeds.memory`` among them.
    """

    world: int | None
    per_machine: int
    memory_bytes: int
    base_bytes: int
    speeds: Speeds
    shared_memory: bool = False
    shared_cores: bool = False

    @property
    def worlds(self) -> Sequence[int]:
        """Numbers of ranks that it can be run on."""
        return range(1, self.per_machine + 1) if self.world is None else (self.world,)

    def rank_bytes(self, world: int) -> int:
        """Memory of one of ``world`` ranks."""
        return self.memory_bytes // min(world, self.per_machine) if self.shared_memory else self.memory_bytes

    def rank_flops(self, world: int) -> float:
        """Products and sums that one of ``world`` ranks does in a second."""
        return self.speeds.flops / self._sharing(world)

    def rank_memory(self, world: int) -> float:
        """Bytes that one of ``world`` ranks reads or writes in a second."""
        return self.speeds.memory / self._sharing(world)

    def _sharing(self, world: int) -> int:
        return min(world, self.per_machine) if self.shared_cores else 1

    def keeps_together(self, ranks: int, world: int) -> bool:
        """Whether each block of ``ranks`` consecutive ranks is on one machine."""
        return world <= self.per_machine or self.per_machine % ranks == 0

    def link(self, ranks: int, world: int) -> float:
        """Bytes per second within a block of ``ranks`` consecutive ranks."""
        return self.speeds.near if self.keeps_together(ranks, world) else self.speeds.far


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of a rank, upper estimates but for the weights.

    activations: with what travels between ranks. states: copies of those that are taken from one microbatch.
    """

    weights: int
    activations: int
    states: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.states


def need_of(topology: Topology, work: Work) -> Need:
    """Bytes of a rank of the stage that needs most, with the layers divided evenly."""
    return _need_of_replica(replace(topology, dp=1), work)


@cache
def _need_of_replica(topology: Topology, work: Work) -> Need:
    stages = split_layers(work.layers, topology.pp)
    points: list[list[HookPoint]] = [[] for _ in stages]
    for point in work.points:
        points[stage_of(point, stages)].append(point)
    needs = (_stage_need(len(stages[n]), points[n], topology, work, first=n == 0) for n in range(len(stages)))
    return max(needs, key=lambda need: need.total)


def stage_need(stage: int, stages: Sequence[range], topology: Topology, work: Work) -> Need:
    """Bytes of a rank for one of ``stages``, which are the layer indices of each."""
    points = points_of_stage(work.points, stages, stage)
    return _stage_need(len(stages[stage]), points, topology, work, first=stage == 0)


def _stage_need(layers: int, points: Sequence[HookPoint], topology: Topology, work: Work, *, first: bool) -> Need:
    shape, tp, itemsize = work.shape, topology.tp, work.itemsize
    own_tokens = -(-work.tokens // topology.cp)
    activations = activation_bytes(
        shape, tokens=own_tokens, tp=tp, itemsize=itemsize, sp=topology.sp, mlp_rows=work.mlp_rows
    )
    if topology.cp > 1:
        activations += gathered_bytes(shape, tokens=work.tokens, tp=tp, itemsize=itemsize)
    if topology.pp > 1:
        sent_tokens = -(-own_tokens // tp) if topology.sp else own_tokens
        activations += travelling_bytes(shape, tokens=sent_tokens, itemsize=itemsize)
    widths = [state_width(point, shape, keys=work.max_tokens, heads=work.heads) for point in points]
    # a part of the width of all rows, or the whole width of a part of the rows; of one hook point at a time it is both
    exchanged = max(
        (width for point, width in zip(points, widths, strict=True) if point.site in SPLIT_SITES), default=0
    )
    return Need(
        weights=weight_bytes(
            shape,
            layers=layers,
            tp=tp,
            first=first,
            final_norm=any(point.normed for point in points),
            itemsize=itemsize,
        ),
        activations=activations,
        states=-(-own_tokens // tp) * (sum(widths) + exchanged) * itemsize,
    )


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a rank does and sends for one microbatch. flops: of products. moved: bytes to and from its memory. tp, cp,
    pp: bytes that it sends along an axis; tp_exchanges, cp_exchanges, pp_sends: in how many exchanges."""

    flops: float
    moved: float
    tp: float
    tp_exchanges: int
    cp: float
    cp_exchanges: int
    pp: float
    pp_sends: int


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of a rank for one microbatch, by what they go into."""

    products: float
    memory: float
    tp: float
    cp: float
    pp: float

    @property
    def secs(self) -> float:
        """In all: sending to the next stage happens meanwhile."""
        return max(self.products + self.memory + self.tp + self.cp, self.pp)


def load_of(topology: Topology, work: Work, *, layers: int | None = None) -> Load:
    """What a rank has of one full microbatch, all of whose sequences have ``work.max_tokens``.

    Args:
        layers: that it runs; None is what the longest stage has where they are divided evenly.
    """
    shape, tokens, itemsize = work.shape, work.tokens, work.itemsize
    tp, cp = topology.tp, topology.cp
    layers = max(map(len, split_layers(work.layers, topology.pp))) if layers is None else layers
    attended = 2 * shape.num_heads * shape.head_dim * work.max_tokens
    own_tokens = tokens // cp
    alive = activation_bytes(shape, tokens=own_tokens, tp=tp, itemsize=itemsize, sp=topology.sp, mlp_rows=work.mlp_rows)
    hidden_bytes = own_tokens * shape.hidden_size * itemsize
    keys_and_values = tokens * 2 * (shape.num_query_groups // tp) * shape.head_dim * itemsize
    return Load(
        flops=layers * tokens * (2 * layer_parameters(shape, 1) + attended) / (tp * cp),
        moved=layers * (layer_parameters(shape, tp) * itemsize + 2 * alive),
        tp=layers * 2 * 2 * (tp - 1) / tp * hidden_bytes,
        tp_exchanges=0 if tp == 1 else layers * (4 if topology.sp else 2),
        cp=layers * (cp - 1) / cp * keys_and_values,
        cp_exchanges=0 if cp == 1 else layers * 2,
        pp=0.0 if topology.pp == 1 else hidden_bytes / (tp if topology.sp else 1) * topology.vp,
        pp_sends=0 if topology.pp == 1 else topology.vp,
    )


def spent(load: Load, topology: Topology, machine: Machine) -> Spent:
    """What ``load`` takes a rank."""
    world, latency = topology.world, machine.speeds.latency
    return Spent(
        products=load.flops / machine.rank_flops(world),
        memory=load.moved / machine.rank_memory(world),
        tp=load.tp_exchanges * latency + load.tp / machine.link(topology.tp, world),
        cp=load.cp_exchanges * latency + load.cp / machine.link(topology.tp * topology.cp, world),
        pp=load.pp_sends * latency + load.pp / machine.link(world, world),
    )


def secs_of(topology: Topology, work: Work, machine: Machine) -> float:
    """Seconds for one microbatch of each replica, divided by the replicas."""
    return spent(load_of(topology, work), topology, machine).secs / topology.dp
