"""Hypotheses about the order of layers: stages of a pipeline in disorder, and a layer in the wrong place."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from nemo_qwen_hidden.doctor.hypothesis import Hypothesis
from nemo_qwen_hidden.doctor.reference import Edits, Reference
from nemo_qwen_hidden.hookpoint import HookPoint


def hypotheses(reference: Reference, first_wrong: HookPoint) -> Iterator[Hypothesis]:
    """Orders that a pipeline could have come to, and small ones around the first hook point that differs."""
    for says, order in layer_orders(reference.num_layers, first_wrong):
        yield Hypothesis(fault="layers-out-of-order", says=says, edits=(partial(run_layers, order=order),))


def run_layers(reference: Reference, edits: Edits, order: Sequence[int | None]) -> None:
    """Runs layers in another order, some perhaps twice; None leaves a place out."""
    layers, placed = reference.layers, list[nn.Module]()
    for place, index in enumerate(order):
        if index is None:
            placed.append(_Passing())
        else:  # hooks tell places apart by their modules
            placed.append(copy.deepcopy(layers[index]) if index in order[:place] else layers[index])
    edits.attribute(reference.model, "layers", nn.ModuleList(placed))


class _Passing(nn.Module):
    """In the place of a layer that is left out; has what hooks are put on, of which none but its own is called."""

    attention_type = "full_attention"

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.post_attention_layernorm = nn.Identity(), nn.Identity(), nn.Identity()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.self_attn, name, nn.Identity())
        self.mlp.down_proj = nn.Identity()

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def layer_orders(count: int, first_wrong: HookPoint) -> Iterator[tuple[str, list[int | None]]]:
    """Orders that a pipeline could have come to, and small ones around the first layer that differs."""
    seen: set[tuple[int | None, ...]] = {tuple(range(count))}

    def fresh(says: str, order: Sequence[int | None]) -> Iterator[tuple[str, list[int | None]]]:
        if tuple(order) not in seen:
            seen.add(tuple(order))
            yield says, list(order)

    for stages in range(2, min(count, 16) + 1):
        if count % stages:
            continue
        size = count // stages
        blocks = [list(range(start, start + size)) for start in range(0, count, size)]
        for shift in (1, stages - 1):
            order = [layer for block in blocks[shift:] + blocks[:shift] for layer in block]
            yield from fresh(
                f"{stages} pipeline stages of {size} layers run in the wrong order, {shift} too early", order
            )
        order = [layer for block in reversed(blocks) for layer in block]
        yield from fresh(f"{stages} pipeline stages of {size} layers run in reverse order", order)
        for chunks in range(2, stages):
            if stages % chunks:
                continue
            ranks = stages // chunks
            interleaved = [chunk * ranks + rank for rank in range(ranks) for chunk in range(chunks)]
            order = [layer for index in interleaved for layer in blocks[index]]
            says = f"{chunks} virtual stages on each of {ranks} ranks run rank by rank, not chunk by chunk"
            yield from fresh(says, order)
            inverse = [interleaved.index(index) for index in range(stages)]
            order = [layer for index in inverse for layer in blocks[index]]
            yield from fresh(f"{chunks} virtual stages on each of {ranks} ranks hold each other's layers", order)
    yield from fresh("the layers run in reverse order", list(reversed(range(count))))
    layer = first_wrong.layer
    if layer is None:
        return
    for start in (layer, layer - 1):
        if 0 <= start < count - 1:
            order = [*range(start), start + 1, start, *range(start + 2, count)]
            yield from fresh(f"layers {start} and {start + 1} are swapped", order)
    for other in range(count):
        order = [other if index == layer else index for index in range(count)]
        yield from fresh(f"layer {other} runs in the place of layer {layer}", order)
    yield from fresh(f"layer {layer} is left out", [None if index == layer else index for index in range(count)])
    yield from fresh(
        f"layer {layer} is left out, and those after it move up",
        [*(index for index in range(count) if index != layer), None],
    )
