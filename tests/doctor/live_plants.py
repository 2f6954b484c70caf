"""Faults planted in a live Megatron model on its ranks, and the doctor's report on each.

A plant is a context manager that is entered on every rank with the model just loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from nemo_qwen_hidden.doctor.observation import Passage
from nemo_qwen_hidden.doctor.report import Report
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology

Plant = Callable[[Any], AbstractContextManager[Any]]


def reports(
    rank: Rank, topology: Topology, folder: Path, documents: Sequence[Sequence[int]], plants: Sequence[str], dtype: str
) -> list[Report] | None:
    """The doctor's report on each plant (a name in ``PLANTS``), from rank 0."""
    from nemo_qwen_hidden.checkpoint.architecture import read_architecture
    from nemo_qwen_hidden.doctor import live
    from nemo_qwen_hidden.doctor.checkup import check_up
    from nemo_qwen_hidden.doctor.visit import SITES
    from nemo_qwen_hidden.hookpoint import expand
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    passages = [Passage(document=n, token_ids=torch.tensor(ids)) for n, ids in enumerate(documents)]
    examined = []
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        for name in plants:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, dtype=dtype)
            points = expand(("embed", *(f"{site}@0:" for site in SITES), "final_norm"), num_layers=4)
            with PLANTS[name](model), torch.no_grad():
                examined.append(live.examine(model, passages, points, compute=dtype, batch_tokens=4096, packing=True))
        dist.barrier()
    if rank.rank:
        return None
    architecture = read_architecture(folder)
    return [
        check_up(each.observation, folder, architecture, subject=[], checks=each.checks, findings=each.findings)
        for each in examined
    ]


def healthy_reports(
    rank: Rank, topologies: Sequence[Topology], folder: Path, documents: Sequence[Sequence[int]]
) -> list[Report]:
    """One layout after the other, all of as many ranks."""
    found = []
    for number, topology in enumerate(topologies):
        elsewhere = replace(rank, rendezvous=rank.rendezvous.with_name(f"{rank.rendezvous.name}-{number}"))
        found += reports(elsewhere, topology, folder, documents, ["healthy"], "fp32") or []
    return found


def layers(model: Any) -> Iterator[Any]:
    for chunk in model.chunks:
        yield from chunk.decoder.layers


@contextmanager
def rope_base(model: Any) -> Iterator[None]:
    for chunk in model.chunks:
        rotary = chunk.rotary_pos_emb
        dim = 2 * len(rotary.inv_freq)
        rotary.inv_freq = 1e4 ** -(torch.arange(0, dim, 2).float() / dim)
        rotary.forward.cache_clear()  # Megatron remembers tables by their length
    yield


@contextmanager
def positions_shifted(model: Any) -> Iterator[None]:
    for chunk in model.chunks:
        rotary = chunk.rotary_pos_emb
        rotary.forward = partial(rotary.forward, offset=2)
    yield


@contextmanager
def no_qkv_bias(model: Any) -> Iterator[None]:
    with torch.no_grad():
        for layer in layers(model):
            layer.self_attention.linear_qkv.bias.zero_()
    yield


@contextmanager
def gate_and_up_swapped(model: Any) -> Iterator[None]:
    with torch.no_grad():
        for layer in layers(model):
            weight = layer.mlp.linear_fc1.weight
            weight.copy_(torch.cat(list(reversed(weight.chunk(2)))))
    yield


@contextmanager
def dropout_on_embeddings(model: Any) -> Iterator[None]:
    """As where ``hidden_dropout`` is set and the model trains."""
    handles = []
    for chunk in model.chunks:
        if chunk.pre_process:

            def drop(_module: Any, _inputs: Any, output: Any) -> Any:
                return torch.nn.functional.dropout(output, 0.1, training=True)

            handles.append(chunk.embedding.register_forward_hook(drop))
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def attention_dropout(model: Any) -> Iterator[None]:
    from nemo_qwen_hidden.model.spec import F

    attend = F.scaled_dot_product_attention

    def dropping(*args: Any, **kwargs: Any) -> Any:
        return attend(*args, **{**kwargs, "dropout_p": 0.1})

    with patch.object(F, "scaled_dot_product_attention", dropping):
        yield


@contextmanager
def norm_epsilon(model: Any) -> Iterator[None]:
    for chunk in model.chunks:
        for module in chunk.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.eps = 1e-3
    yield


@contextmanager
def not_causal(model: Any) -> Iterator[None]:
    from nemo_qwen_hidden.model.spec import SdpaCoreAttention

    attend = SdpaCoreAttention._attend

    def everything(self: Any, query: Any, key: Any, value: Any, seen: Any) -> Any:
        return attend(self, query, key, value, torch.ones(len(query), len(key), dtype=torch.bool))

    with patch.object(SdpaCoreAttention, "_attend", everything):
        yield


@contextmanager
def documents_leak(model: Any) -> Iterator[None]:
    """The bounds of packed documents are lost on the way to attention."""
    from nemo_qwen_hidden.model.spec import SdpaCoreAttention

    forward = SdpaCoreAttention.forward

    def unbounded(self: Any, query: Any, key: Any, value: Any, mask: Any, *_: Any, **__: Any) -> Any:
        whole = [each[:, None] for each in (query, key, value)]
        return forward(self, *whole, mask)[:, 0]

    with patch.object(SdpaCoreAttention, "forward", unbounded):
        yield


@contextmanager
def qkv_in_plain_order(model: Any) -> Iterator[None]:
    """What a converter writes that does not know of query groups."""
    config = model.config
    per_group, dim = config.num_attention_heads // config.num_query_groups, config.kv_channels
    with torch.no_grad():
        for layer in layers(model):
            linear = layer.self_attention.linear_qkv
            for parameter in (linear.weight, linear.bias):
                groups = parameter.unflatten(0, (-1, per_group + 2, dim))
                parts = [groups[:, :per_group], groups[:, per_group : per_group + 1], groups[:, per_group + 1 :]]
                parameter.copy_(torch.cat([part.flatten(0, 2) for part in parts]))
    yield


@contextmanager
def layers_swapped(model: Any) -> Iterator[None]:
    first, second = list(layers(model))[1:3]
    kept = {name: value.clone() for name, value in first.state_dict().items() if value is not None}
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            parameter.copy_(second.get_parameter(name))
        for name, parameter in second.named_parameters():
            parameter.copy_(kept[name])
    yield


@contextmanager
def stages_swapped(model: Any) -> Iterator[None]:
    """Each of two pipeline ranks has loaded the other's layers."""
    _swap_over(model.groups.pp, [parameter for layer in layers(model) for parameter in layer.parameters()])
    yield


@contextmanager
def vocabulary_swapped(model: Any) -> Iterator[None]:
    """Each of two tensor parallel ranks has the other's range of the embedding table."""
    _swap_over(model.groups.tp, [chunk.embedding.word_embeddings.weight for chunk in model.chunks if chunk.pre_process])
    yield


def _swap_over(group: Any, parameters: Sequence[Any]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            both = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(both, parameter.detach().contiguous(), group=group)
            parameter.copy_(both[1 - group.rank()])


@contextmanager
def not_reduced(model: Any) -> Iterator[None]:
    """Row parallel linears give what their own rank has."""
    from megatron.core.tensor_parallel import layers as linears

    with patch.object(linears, "reduce_from_tensor_model_parallel_region", lambda value, **_: value):
        yield


@contextmanager
def other_norm_on_one_tp_rank(model: Any) -> Iterator[None]:
    with torch.no_grad():
        if model.groups.place.tp == 1:
            model.module.decoder.final_layernorm.weight.mul_(1.01)
    yield


@contextmanager
def other_weights_on_one_replica(model: Any) -> Iterator[None]:
    with torch.no_grad():
        if model.groups.place.dp == 1:
            list(layers(model))[1].mlp.linear_fc2.weight.mul_(1.001)
    yield


def _consecutive(microbatch: Any, *, part: int, parts: int) -> tuple[range, ...]:
    """Of every document the part-th piece."""
    spans = []
    for start, stop in pairwise(microbatch.bounds()):
        size = (stop - start) // parts
        spans.append(range(start + part * size, start + (part + 1) * size))
    return tuple(spans)


@contextmanager
def zigzag_not_undone(model: Any) -> Iterator[None]:
    """Each context parallel rank takes its tokens for consecutive ones when they are copied."""
    from nemo_qwen_hidden.capture import pipeline, rows

    view_of = pipeline.view_of

    def wrong(*args: Any, **kwargs: Any) -> Any:
        with patch.object(rows, "spans_of", _consecutive):
            view = view_of(*args, **kwargs)
        return replace(view, spans=view_of(*args, **kwargs).spans)

    with patch.object(pipeline, "view_of", wrong):
        yield


@contextmanager
def never_zigzagged(model: Any) -> Iterator[None]:
    """The ranks are given consecutive tokens; Megatron's positions and attention know nothing of it."""
    from nemo_qwen_hidden.capture import rows

    with patch.object(rows, "spans_of", _consecutive):
        yield


@contextmanager
def stripes_swapped(model: Any) -> Iterator[None]:
    """Each of two sequence parallel ranks takes its stripe for the other's when states are copied."""
    from nemo_qwen_hidden.capture import rows

    stripe = rows.stripe

    def others(tokens: int, *, part: int, parts: int) -> range:
        return stripe(tokens, part=parts - 1 - part, parts=parts)

    with patch.object(rows, "stripe", others):
        yield


PLANTS: dict[str, Plant] = {
    "healthy": lambda model: nullcontext(),
    "rope_base": rope_base,
    "positions_shifted": positions_shifted,
    "no_qkv_bias": no_qkv_bias,
    "gate_and_up_swapped": gate_and_up_swapped,
    "dropout_on_embeddings": dropout_on_embeddings,
    "attention_dropout": attention_dropout,
    "norm_epsilon": norm_epsilon,
    "not_causal": not_causal,
    "documents_leak": documents_leak,
    "qkv_in_plain_order": qkv_in_plain_order,
    "layers_swapped": layers_swapped,
    "stages_swapped": stages_swapped,
    "vocabulary_swapped": vocabulary_swapped,
    "not_reduced": not_reduced,
    "other_norm_on_one_tp_rank": other_norm_on_one_tp_rank,
    "other_weights_on_one_replica": other_weights_on_one_replica,
    "zigzag_not_undone": zigzag_not_undone,
    "never_zigzagged": never_zigzagged,
    "stripes_swapped": stripes_swapped,
}
