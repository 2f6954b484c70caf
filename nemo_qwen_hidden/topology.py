"""The parallel layout as integers: how many ranks along each axis, and where one rank stands.

Rank order is Megatron-Core's default, ``tp`` fastest, then ``dp``, then ``pp``.
"""

from dataclasses import dataclass

from nemo_qwen_hidden.errors import ConfigError, UserError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the axes: tensor, pipeline and data parallel; ``sp`` splits the sequence over the tp axis.

    Raises:
        ConfigError: a size below 1, or sequence parallelism without tensor parallelism.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "dp"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"parallel.{axis}", "must be at least 1", getattr(self, axis))
        if self.sp and self.tp == 1:
            raise ConfigError(
                "parallel.sp", "splits the sequence over the tp axis and needs `parallel.tp` of 2 or more", True
            )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def at(self, rank: int) -> "Place":
        """Where ``rank`` stands on each axis."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not one of {self.world}")
        return Place(topology=self, tp=rank % self.tp, dp=rank // self.tp % self.dp, pp=rank // (self.tp * self.dp))

    def rank(self, *, tp: int, dp: int, pp: int) -> int:
        """The rank that stands at these coordinates."""
        return tp + self.tp * (dp + self.dp * pp)

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp} dp={self.dp} sp={str(self.sp).lower()}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Coordinates of one rank in a topology."""

    topology: Topology
    tp: int
    dp: int
    pp: int

    @property
    def rank(self) -> int:
        return self.topology.rank(tp=self.tp, dp=self.dp, pp=self.pp)


def resolve_dp(*, tp: int, pp: int, dp: int | None, world: int | None) -> int:
    """Number of data-parallel replicas: as asked, or as many as fill ``world`` ranks.

    ``world`` is None where no launcher has fixed the number of ranks.

    Raises:
        ConfigError: the ranks there are do not match the layout.
    """
    if world is None:
        return 1 if dp is None else dp
    if dp is not None:
        if tp * pp * dp != world:
            raise ConfigError(
                "parallel", f"must multiply to the number of ranks started ({world})", f"tp={tp} x pp={pp} x dp={dp}"
            )
        return dp
    if tp < 1 or pp < 1 or world % (tp * pp):
        raise ConfigError("parallel", f"must divide the number of ranks started ({world})", f"tp={tp} x pp={pp}")
    return world // (tp * pp)


def model_problems(
    topology: Topology, *, num_layers: int, num_heads: int, num_query_groups: int, ffn_hidden_size: int
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
    if topology.pp > num_layers:
        problems.append(
            ConfigError(
                "parallel.pp", f"must be at most the number of layers that have to run ({num_layers})", topology.pp
            )
        )
    return problems
