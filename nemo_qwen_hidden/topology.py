"""The parallel layout as integers: how many ranks along each axis, and where one rank stands.

Rank order is Megatron-Core's default, ``tp`` fastest, then ``cp``, then ``dp``, then ``pp``.
"""

from dataclasses import dataclass
from math import lcm

from nemo_qwen_hidden.errors import ConfigError, UserError

AXES = ("tp", "pp", "vp", "cp", "dp")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the axes: tensor, pipeline, context and data parallel.

    vp: virtual stages, parts of the decoder that each pipeline rank holds; they add no ranks. sp: whether the sequence
    is split over the tp axis too.

    Raises:
        ConfigError: a size below 1, sequence parallelism without tensor parallelism, virtual stages without stages.
    """

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    dp: int = 1
    sp: bool = False

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ConfigError(f"parallel.{axis}", "must be at least 1", getattr(self, axis))
        if self.sp and self.tp == 1:
            raise ConfigError(
                "parallel.sp", "splits the sequence over the tp axis and needs `parallel.tp` of 2 or more", True
            )
        if self.vp > 1 and self.pp == 1:
            raise ConfigError("parallel.vp", "divides pipeline stages and needs `parallel.pp` of 2 or more", self.vp)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def stages(self) -> int:
        """Stages of the pipeline, virtual ones counted: stage g is on pipeline rank g % pp."""
        return self.pp * self.vp

    @property
    def segment_multiple(self) -> int:
        """What the length of each packed document has to be a multiple of: context parallelism cuts it into 2 * cp."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def sequence_multiple(self) -> int:
        """What the sequence axis has to be a multiple of: chunks of context parallelism, and in what is left on a
        context-parallel rank, stripes of sequence parallelism."""
        return lcm(self.segment_multiple, self.cp * (self.tp if self.sp else 1))

    def at(self, rank: int) -> "Place":
        """Where ``rank`` stands on each axis."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not one of {self.world}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Place(topology=self, tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, *, tp: int, dp: int, pp: int, cp: int = 0) -> int:
        """The rank that stands at these coordinates."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def __str__(self) -> str:
        more = "".join(f" {axis}={getattr(self, axis)}" for axis in ("vp", "cp") if getattr(self, axis) > 1)
        return f"tp={self.tp} pp={self.pp}{more} dp={self.dp} sp={str(self.sp).lower()}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Coordinates of one rank in a topology."""

    topology: Topology
    tp: int
    cp: int = 0
    dp: int
    pp: int

    @property
    def rank(self) -> int:
        return self.topology.rank(tp=self.tp, cp=self.cp, dp=self.dp, pp=self.pp)

    @property
    def stages(self) -> range:
        """The stages of the pipeline that this rank holds, in the order in which a microbatch meets them."""
        return range(self.pp, self.topology.stages, self.topology.pp)


def resolve_dp(*, tp: int, pp: int, cp: int, dp: int | None, world: int | None) -> int:
    """Number of data-parallel replicas: as asked, or as many as fill ``world`` ranks.

    ``world`` is None where no launcher has fixed the number of ranks.

    Raises:
        ConfigError: the ranks there are do not match the layout.
    """
    if world is None:
        return 1 if dp is None else dp
    context = f" x cp={cp}" if cp > 1 else ""
    if dp is not None:
        if tp * pp * cp * dp != world:
            rule = f"must multiply to the number of ranks started ({world})"
            raise ConfigError("parallel", rule, f"tp={tp} x pp={pp}{context} x dp={dp}")
        return dp
    if min(tp, pp, cp) < 1 or world % (tp * pp * cp):
        rule = f"must divide the number of ranks started ({world})"
        raise ConfigError("parallel", rule, f"tp={tp} x pp={pp}{context}")
    return world // (tp * pp * cp)


def model_problems(
    topology: Topology, *, num_heads: int, num_query_groups: int, ffn_hidden_size: int
) -> list[UserError]:
    """Why a model of this shape cannot run in this layout; empty when it can."""
    problems: list[UserError] = []
    divided = (
        ("num_key_value_heads", num_query_groups),
        ("num_attention_heads", num_heads),
        ("intermediate_size", ffn_hidden_size),
    )
    for what, size in divided:
        if size % topology.tp:
            problems.append(ConfigError("parallel.tp", f"must divide `{what}` ({size})", topology.tp))
            break  # one line says enough of one setting
    return problems


def vocabulary_problems(topology: Topology, vocab_size: int) -> list[UserError]:
    """Why a model with this vocabulary cannot be trained in this layout, empty when it can: padding of the embedding
    and the output layer would take part in the loss."""
    if vocab_size % topology.tp == 0:
        return []
    return [ConfigError("parallel.tp", f"must divide `vocab_size` ({vocab_size}) for training", topology.tp)]
