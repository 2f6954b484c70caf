"""What the store of a training run is, before there is a step in it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from megatron.core.transformer import TransformerConfig

from nemo_qwen_hidden.hookpoint import HookPoint, by_depth
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.plan.shapes import state_shape
from nemo_qwen_hidden.provenance import record_of
from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.training.chunks import live_peft


def describe(
    config: TransformerConfig,
    points: Sequence[HookPoint],
    groups: ProcessGroups,
    *,
    work: str,
    compute: str,
    stored: str,
    adapter: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Manifest:
    """A manifest without parts.

    The weight of the final norm, which training changes, is not in it, and so no divisor of states behind that norm.

    Args:
        config: of the model in training. points: all that are captured, of any stage. work: what the run does to the
            store, in words. compute, stored: dtypes, such as ``bf16``. adapter: what is trained instead of the
            weights, see ``adapter_of``. model: what the run began with, as a manifest says it (``path``,
            ``weights_sha256``); its sizes are added.
    """
    shape = decoder_shape(config)
    architecture = {**vars(shape), "rotary_base": config.rotary_base, "norm_epsilon": config.layernorm_epsilon}
    entries = (
        HookPointEntry.of(
            point, num_layers=shape.num_layers, shards=0, shape=state_shape(point, shape, keys=config.seq_length)
        )
        for point in by_depth(points, shape.num_layers)
    )
    return Manifest(
        hidden_size=shape.hidden_size,
        compute_dtype=compute,
        stored_dtype=stored,
        hook_points=tuple(entries),
        parts=(),
        model={
            **(model or {}),
            "architecture": architecture,
            **({} if adapter is None else {"adapter": dict(adapter)}),
        },
        tokenizer=dict(tokenizer or {}),
        producers=(record_of(work, points, groups.topology, time.time()),),
    )


def adapter_of(trainer: Trainer) -> dict[str, Any] | None:
    """The adapter that is trained instead of the weights, as a manifest says it: its kind, sizes and places; None where
    there is none. It has no fingerprint, being another one in each step."""
    peft = live_peft(trainer)
    if peft is None:
        return None
    said = {name: getattr(peft, name) for name in ("dim", "alpha") if hasattr(peft, name)}
    return {"kind": type(peft).__name__, **said, "target_modules": list(getattr(peft, "target_modules", ()))}


def decoder_shape(config: TransformerConfig) -> DecoderShape:
    """The sizes of a model in training."""
    return DecoderShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        head_dim=config.kv_channels,
        ffn_hidden_size=config.ffn_hidden_size,
        vocab_size=config.vocab_size,
    )
