"""Training runs of tests with states captured, and what those states should be."""

import hashlib
import pickle
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from nemo_qwen_hidden.parallel.launch import Rank
from tests.support.training import SEQ_LENGTH, Job, Piece, trainer_of


@dataclass(frozen=True)
class State:
    """One state as a rank got it."""

    phase: str
    step: int
    microbatch: int
    sample: int
    point: str
    position: int


@dataclass(kw_only=True)
class Captured:
    """Of one rank. states: in the order in which they came, with what they are. samples: token ids by phase, step and
    sample. weights: by step, before it. fingerprints: of losses, gradients, weights and random states after each step.
    """

    states: list[tuple[State, np.ndarray]] = field(default_factory=list)
    samples: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)
    weights: dict[int, list[Piece]] = field(default_factory=dict)
    fingerprints: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Capturing:
    """A job, and arguments of HiddenStatesCallback; None: without one.

    weights: keep those of every step. store: a folder that a second callback with the same arguments writes to. saved:
    a checkpoint, written before step 3 where it is not there, and the run then ends with an error in step 4; where it
    is there the run goes on from it. collate: makes batches of samples, instead of torch's way.
    """

    job: Job
    settings: dict[str, Any] | None
    weights: bool = False
    store: Path | None = None
    saved: Path | None = None
    collate: Callable[[list[dict[str, torch.Tensor]]], dict[str, Any]] | None = None


class Crash(RuntimeError):
    """The end of a run that is to be resumed."""


def capture_in_training(rank: Rank, folder: Path, runs: Sequence[Capturing]) -> list[Captured]:
    """One run after another, all over the same ranks."""
    return [_run(rank, folder, run) for run in runs]


def _run(rank: Rank, folder: Path, run: Capturing) -> Captured:
    from nemo_qwen_hidden.training.watch.callback import HiddenStatesCallback

    found = Captured()
    callbacks = [bystander(found, run.weights)]
    if run.settings is not None:
        callbacks.append(HiddenStatesCallback(to=lambda states: note(found, states), **run.settings))
        if run.store is not None:
            callbacks.append(HiddenStatesCallback(to=run.store, **run.settings))
    resumed = run.saved if run.saved is not None and run.saved.exists() else None
    if run.saved is not None and resumed is None:
        callbacks.append(_saboteur(run.saved))
    with trainer_of(rank, run.job, folder, callbacks) as (trainer, model, data), suppress(Crash):
        if run.collate is not None:
            data._loader = partial(_loader, collate_fn=run.collate)
        trainer.fit(model, data, ckpt_path=resumed)
    return found


def _loader(mode: str, blocks: Any, **more: Any) -> Any:
    from nemo.lightning.data import WrappedDataLoader

    return WrappedDataLoader(mode, dataset=blocks, num_workers=0, **more)


def ragged(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A padded batch that says how long each sample is, which its first token decides."""
    batch: dict[str, Any] = default_collate(samples)
    batch["lengths"] = [length_of(int(row[0])) for row in batch["tokens"]]
    for row, length in zip(batch["tokens"], batch["lengths"], strict=True):
        row[length:] = row[0]
    return batch


def length_of(first_token: int) -> int:
    return 1 + first_token % SEQ_LENGTH


PACKED = (6, 8)


def packed(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A pack of documents of ``PACKED`` tokens, and padding, as NeMo's ``GPTSFTPackedDataset`` makes it."""
    batch: dict[str, Any] = default_collate(samples)
    bounds = [0, PACKED[0], sum(PACKED), SEQ_LENGTH]
    batch["cu_seqlens"] = torch.tensor([[*bounds, -1]], dtype=torch.int32)
    batch["cu_seqlens_argmin"] = torch.tensor([[len(bounds)]])
    batch["max_seqlen"] = torch.tensor([[max(PACKED)]])
    batch["token_count"] = [sum(PACKED)]
    batch["position_ids"] = torch.cat([torch.arange(stop - start) for start, stop in pairwise(bounds)])[None]
    return batch


def masked(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The same documents, told apart by a mask, as data modules with ``reset_attention_mask`` do."""
    batch = packed(samples)
    hidden = torch.ones(SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool)
    for start, stop in pairwise(batch.pop("cu_seqlens")[0, :-1].tolist()):
        hidden[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
    del batch["cu_seqlens_argmin"], batch["max_seqlen"]
    return batch | {"attention_mask": hidden[None, None]}


def shifted_data_step(batches: Any) -> dict[str, Any]:
    """NeMo's, but that tokens are not where the data loader had them."""
    from nemo.collections.llm.gpt.model.base import gpt_data_step

    batch: dict[str, Any] = gpt_data_step(batches)
    if batch["tokens"] is not None:
        batch["tokens"] = batch["tokens"].roll(1, dims=1)
    return batch


def _saboteur(saved: Path) -> Any:
    import lightning.pytorch as pl

    class Saboteur(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(saved)

        def on_megatron_microbatches_end(self, step: Any) -> None:
            if step.trainer.training and step.trainer.global_step == 4:
                raise Crash("in step 4")

    return Saboteur()


def note(found: Captured, states: Any) -> None:
    from nemo_qwen_hidden.training.watch.step_states import ROW_STRIDE

    for sample in states.samples:
        found.samples[states.phase, states.step, sample.number] = sample.token_ids.tolist()
    for piece in states.slices:
        row = 0
        for run in piece.runs:
            sample, position = divmod(run.first_row, ROW_STRIDE)
            for offset in range(run.length) if run.picked is None else run.picked:
                name = State(
                    states.phase, states.step, piece.microbatch, sample, str(piece.hook_point), position + offset
                )
                found.states.append((name, piece.values[row].float().numpy()))
                row += 1
        assert row == len(piece.values)


def bystander(found: Captured, weights: bool) -> Any:
    import lightning.pytorch as pl

    from nemo_qwen_hidden.training.chunks import live_chunks
    from tests.support.training import pieces_of

    class Bystander(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if weights:
                found.weights[trainer.global_step] = pieces_of(trainer)

        def on_validation_start(self, trainer: Any, *_: Any) -> None:
            if weights:
                found.weights[trainer.global_step] = pieces_of(trainer)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            found.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))
            found.fingerprints.append(_fingerprint(trainer, live_chunks(trainer)))

    return Bystander()


def _fingerprint(trainer: Any, chunks: Sequence[Any]) -> str:
    """SHA-256 over the loss, all gradients and weights, and the states of every source of random numbers."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    digest = hashlib.sha256(repr(float(trainer.callback_metrics["reduced_train_loss"])).encode())
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
            if parameter.requires_grad:
                digest.update(parameter.main_grad.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    tracker = get_cuda_rng_tracker().get_states()
    digest.update(pickle.dumps((np.random.get_state(), random.getstate(), sorted(tracker))))
    return digest.hexdigest()


def transformers_model(folder: Path, weights: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> Any:
    """The Qwen2 of ``folder`` by transformers, with weights by the names of Megatron's checkpoints."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    config, state = model.config, {}
    by_name = {name.split("module.")[-1]: torch.from_numpy(values) for name, values in weights.items()}
    groups, per_group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    state["model.embed_tokens.weight"] = by_name["embedding.word_embeddings.weight"]
    state["lm_head.weight"] = by_name.get("output_layer.weight", state["model.embed_tokens.weight"])
    state["model.norm.weight"] = by_name["decoder.final_layernorm.weight"]
    for layer in range(config.num_hidden_layers):
        ours = {
            name.removeprefix("decoder.layers."): values[layer]
            for name, values in by_name.items()
            if name.startswith("decoder.layers.")
        }
        there = f"model.layers.{layer}."
        state[there + "input_layernorm.weight"] = ours["self_attention.linear_qkv.layer_norm_weight"]
        state[there + "post_attention_layernorm.weight"] = ours["mlp.linear_fc1.layer_norm_weight"]
        for part in ("weight", "bias"):  # query group by query group
            mixed = ours[f"self_attention.linear_qkv.{part}"].unflatten(0, (groups, per_group + 2, -1))
            for name, heads in (("q", mixed[:, :-2]), ("k", mixed[:, -2:-1]), ("v", mixed[:, -1:])):
                state[f"{there}self_attn.{name}_proj.{part}"] = heads.flatten(0, 2)
        state[there + "self_attn.o_proj.weight"] = ours["self_attention.linear_proj.weight"]
        gate, up = ours["mlp.linear_fc1.weight"].chunk(2)
        state[there + "mlp.gate_proj.weight"], state[there + "mlp.up_proj.weight"] = gate, up
        state[there + "mlp.down_proj.weight"] = ours["mlp.linear_fc2.weight"]
    model.load_state_dict(state)
    return model


def expected_states(model: Any, token_ids: Sequence[Sequence[int]], points: Sequence[str]) -> dict[str, np.ndarray]:
    """States [samples, tokens, width] by hook point, by hooks on transformers' modules."""
    taken: dict[str, torch.Tensor] = {}
    handles = []

    def take(point: str, module: Any, *, given: bool = False) -> None:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            state = inputs[0] if given else output[0] if isinstance(output, tuple) else output
            taken[point] = state

        handles.append(module.register_forward_hook(hook))

    decoder = model.model
    for point in points:
        site, _, number = point.partition("@")
        layer = decoder.layers[int(number or 0)]
        modules = {
            "embed": decoder.embed_tokens,
            "final_norm": decoder.norm,
            "resid_pre": layer,
            "q": layer.self_attn.q_proj,
            "k": layer.self_attn.k_proj,
            "v": layer.self_attn.v_proj,
            "attn_out": layer.self_attn,
            "resid_mid": layer.post_attention_layernorm,  # the first to see the sum
            "resid_post": layer,
            "z": layer.self_attn.o_proj,
            "mlp_act": layer.mlp.down_proj,
            "mlp_out": layer.mlp,
        }
        take(point, modules[site], given=site in ("resid_pre", "z", "resid_mid", "mlp_act"))
    with torch.no_grad():
        decoder(torch.tensor(token_ids))
    for handle in handles:
        handle.remove()
    return {point: state.numpy() for point, state in taken.items()}
