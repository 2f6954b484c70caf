"""Which decoder layers each stage of the pipeline runs.

Stages are numbered in the order in which a microbatch meets them. With virtual stages, stage g is model chunk
``g // pp`` of pipeline rank ``g % pp``, as in Megatron-Core.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import EMBED, FINAL_NORM, HookPoint


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the layers are divided where they are not divided evenly, by Megatron-Core's names (shortened).

    first_layers, last_layers: layers of the first and the last pipeline rank, over all of its virtual stages; the
    others share the rest. embedding, loss: count the embedding and the output layer as a layer each. layout: Megatron's
    string, as ``Et*3|(tt|)*2tL``: E embedding, t a decoder layer, L the output, | between stages.
    """

    first_layers: int | None = None
    last_layers: int | None = None
    embedding: bool = False
    loss: bool = False
    layout: str | None = None

    @property
    def even(self) -> bool:
        """Whether nothing is asked for, so that any number of layers can be divided."""
        return self == Split()


def split_layers(num_layers: int, stages: int) -> tuple[range, ...]:
    """Contiguous 0-based layer indices of each of ``stages``; sizes differ by at most one, larger ones first."""
    small, larger = divmod(num_layers, stages)
    return _ranges(small + (stage < larger) for stage in range(stages))


def stages_of(num_layers: int, *, pp: int, vp: int = 1, split: Split | None = None) -> tuple[range, ...]:
    """Layer indices of each of the ``pp * vp`` stages.

    Raises:
        ConfigError: the layers cannot be divided so; says what would be right.
    """
    split = split or Split()
    if split.layout is not None:
        return _from_layout(split, num_layers, pp, vp)
    if split.first_layers is not None or split.last_layers is not None:
        return _uneven(split, num_layers, pp, vp)
    if split.embedding or split.loss:
        return _counting_ends(split, num_layers, pp, vp)
    if pp * vp > num_layers:
        setting, rule = ("parallel.vp", "times `parallel.pp` ") if vp > 1 else ("parallel.pp", "")
        rule = f"{rule}must be at most the number of layers that have to run ({num_layers})"
        raise ConfigError(setting, rule, vp if vp > 1 else pp)
    return split_layers(num_layers, pp * vp)


def stage_of(point: HookPoint, stages: Sequence[range]) -> int:
    """The stage on which ``point`` can be seen; ``final_norm`` is on the last one, ``embed`` on the first."""
    if point.site == EMBED:
        return 0
    if point.site == FINAL_NORM:
        return len(stages) - 1
    assert point.layer is not None
    return stage_of_layer(point.layer, stages)


def points_of_stage(points: Sequence[HookPoint], stages: Sequence[range], stage: int) -> tuple[HookPoint, ...]:
    """Those of ``points`` that can be seen on ``stage``."""
    return tuple(point for point in points if stage_of(point, stages) == stage)


def stage_of_layer(layer: int, stages: Sequence[range]) -> int:
    """The stage that runs ``layer``."""
    return next(stage for stage, layers in enumerate(stages) if layer in layers)


def megatron_layout(stages: Sequence[range]) -> list[list[str]]:
    """The same stages as Megatron's ``pipeline_model_parallel_layout``."""
    layout = [["decoder"] * len(layers) for layers in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _ranges(sizes: Iterable[int]) -> tuple[range, ...]:
    stops = itertools.accumulate(sizes, initial=0)
    return tuple(range(start, stop) for start, stop in itertools.pairwise(stops))


def _uneven(split: Split, num_layers: int, pp: int, vp: int) -> tuple[range, ...]:
    if split.embedding or split.loss:
        rule = "must be false where `parallel.first_stage_layers` or `parallel.last_stage_layers` is set"
        raise ConfigError("parallel.account_for_embedding", rule, split.embedding)
    of_rank: list[int | None] = [None] * pp
    for name, position, layers in (("first", 0, split.first_layers), ("last", -1, split.last_layers)):
        if layers is not None:
            if pp == 1 or layers < 0 or layers % vp:
                rule = "must be a number of layers that `parallel.vp` divides, with `parallel.pp` of 2 or more"
                raise ConfigError(f"parallel.{name}_stage_layers", rule, layers)
            of_rank[position] = layers
    rest, others = num_layers - sum(layers or 0 for layers in of_rank), of_rank.count(None)
    if rest < 0 or (rest % (others * vp) if others else rest):
        rule = f"must leave layers that can be shared by the other {others} x {vp} stages (of {num_layers} layers)"
        asked = " and ".join(str(layers) for layers in (split.first_layers, split.last_layers) if layers is not None)
        raise ConfigError("parallel.first_stage_layers, parallel.last_stage_layers", rule, asked)
    sizes = [rest // (others or 1) if layers is None else layers for layers in of_rank]
    return _ranges(size // vp for _ in range(vp) for size in sizes)


def _counting_ends(split: Split, num_layers: int, pp: int, vp: int) -> tuple[range, ...]:
    counted = num_layers + split.embedding + split.loss
    if counted % (pp * vp):
        rule = f"must give a number of layers, ends counted, that {pp} x {vp} stages can share"
        raise ConfigError("parallel.account_for_embedding, parallel.account_for_loss", rule, counted)
    sizes = [counted // (pp * vp)] * (pp * vp)
    sizes[0] -= split.embedding
    sizes[-1] -= split.loss
    if min(sizes) < 0:
        raise ConfigError("parallel.account_for_embedding", "must leave no stage with less than nothing", counted)
    return _ranges(sizes)


def _from_layout(split: Split, num_layers: int, pp: int, vp: int) -> tuple[range, ...]:
    layout, setting = split.layout or "", "parallel.pipeline_layout"
    others = {
        "parallel.first_stage_layers": split.first_layers,
        "parallel.last_stage_layers": split.last_layers,
        "parallel.account_for_embedding": split.embedding,
        "parallel.account_for_loss": split.loss,
    }
    if replaced := [f"`{name}`" for name, value in others.items() if value]:
        raise ConfigError(setting, f"must be alone, without {', '.join(replaced)}", layout)
    stages = list(_parse(layout, setting))
    if len(stages) != pp * vp:
        rule = f"must have `parallel.pp` x `parallel.vp` = {pp} x {vp} stages, divided by |"
        raise ConfigError(setting, rule, f"{layout} ({len(stages)} stages)")
    order = "".join(stages)
    if order != f"E{'t' * num_layers}L":
        rule = f"must be one E, {num_layers} times t (layers of the model), and one L, in this order"
        found = ", ".join(f"{order.count(letter)} {letter}" for letter in "EtL")
        raise ConfigError(setting, rule, f"{layout} ({found})")
    return _ranges(stage.count("t") for stage in stages)


def _parse(layout: str, setting: str) -> Iterator[str]:
    """Stages of Megatron's layout string, repetitions written out: ``(tt|)*2`` is ``tt|tt|``, ``t*3`` is ``ttt``."""
    text = layout.replace(",", "")
    for repeated in (r"\(([^()]+)\)\*(\d+)", r"([^()*])\*(\d+)"):
        text = re.sub(repeated, lambda found: found[1] * int(found[2]), text)
    if not re.fullmatch(r"[EtL|]+", text):
        raise ConfigError(setting, "must be made of E, t, L and |, and repetitions such as t*3 or (tt|)*2", layout)
    yield from text.split("|")
