"""Qwen2HiddenModel: NeMo's Qwen2 whose stages give hidden states instead of logits."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo import lightning as _  # noqa: F401 - before nemo.core, or its registry misses the tokenizer (NeMo 2.7.3)
from nemo.collections.llm.gpt.model.qwen2 import Qwen2Model
from torch import Tensor, nn

from nemo_qwen_hidden.capture.attention import AttentionWeights
from nemo_qwen_hidden.capture.choose import choice_of
from nemo_qwen_hidden.capture.gather import BatchAssembler, LocalStates, SliceBuffer, gather_slices, holdings
from nemo_qwen_hidden.capture.pipeline import Pipeline, TokenRows
from nemo_qwen_hidden.capture.taps import Capture, Sink
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.tensors import OUTPUT, TensorFiles
from nemo_qwen_hidden.errors import CheckpointError, ConfigError, raise_all
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, HookPoint, expand
from nemo_qwen_hidden.model.config import TORCH_DTYPES, Qwen2HiddenConfig, configure
from nemo_qwen_hidden.model.weights import load_weights
from nemo_qwen_hidden.parallel.agree import all_values
from nemo_qwen_hidden.parallel.groups import ProcessGroups, current_groups, has_groups, one_rank
from nemo_qwen_hidden.parallel.host import megatron_on_host
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.plan.microbatches import Batching, Microbatch, plan, replica_of
from nemo_qwen_hidden.plan.shapes import state_shape
from nemo_qwen_hidden.plan.stages import Split, stages_of
from nemo_qwen_hidden.topology import Topology, model_problems

Gather = Literal["rank0", "all", "none"]
MOST_BYTES = 2**30


class Qwen2HiddenModel(Qwen2Model):
    """One rank's part of a Qwen2 or Qwen2.5, under any layout of tensor, pipeline (with virtual stages), context,
    sequence and data parallelism.

    ``forward`` keeps NeMo's signature and gives decoder outputs; ``hidden_states`` gives the states of any hook point.
    A LightningModule like its parent, with NeMo's optimizer and data steps, so that it can be fine-tuned where
    its configuration says ``output_layer=True``.
    """

    config: Qwen2HiddenConfig

    def __init__(self, config: Qwen2HiddenConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.architecture: Architecture | None = None
        self.later_chunks = nn.ModuleList()  # behind self.module, one for each further virtual stage
        self._groups: ProcessGroups | None = None
        self._stages: tuple[range, ...] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        groups: ProcessGroups | None = None,
        dtype: str = "fp32",
        num_layers: int | None = None,
        final_norm: bool = True,
        output_layer: bool = False,
        split: Split | None = None,
    ) -> "Qwen2HiddenModel":
        """Builds this rank's part of a Hugging Face checkpoint and reads its weights. Collective over all ranks
        where ``groups`` is None.

        Args:
            path: a folder with config.json and safetensors, or a hub id; None is the embedded demo model.
            groups: where this rank stands. None joins the process groups that there are (those of NeMo without
                sequence parallelism), or makes a single rank's.
            dtype: of weights and activations: fp32, bf16 or fp16.
            num_layers: keep only the first so many layers; the pipeline is then split over these.
            final_norm: keep the final norm; only with all layers.
            output_layer: keep NeMo's output layer too, so that ``forward`` with labels gives the loss.
            split: how the layers are divided into stages; None: evenly.

        Raises:
            CheckpointError: something of the checkpoint is missing or has the wrong shape.
            UnsupportedModelError: a model that would not be reproduced exactly.
            ConfigError: the model cannot run in this layout.
        """
        folder = locate(None if path is None else str(path))
        architecture = read_architecture(folder)
        if groups is None and has_groups():
            groups = current_groups()
        shape = architecture.shape
        layers = shape.num_layers if num_layers is None else num_layers
        topology = Topology() if groups is None else groups.topology
        stages = _checked_stages(architecture, topology, split, dtype=dtype, num_layers=layers)
        files = TensorFiles.of(folder)
        files.check(shape)
        if output_layer and not architecture.tied and OUTPUT not in files.files:
            raise CheckpointError("model.path", f"must hold the tensor `{OUTPUT}` for its output layer", str(folder))
        groups = groups or one_rank()
        keeps_norm = final_norm and layers == shape.num_layers
        config = configure(architecture, topology, dtype=dtype, stages=stages, final_norm=keeps_norm)
        config.output_layer = output_layer
        model = cls(config)
        with megatron_on_host():
            model.configure_model(vp_stage=0 if topology.vp > 1 else None)
            for vp_stage in range(1, topology.vp):
                model.later_chunks.append(config.configure_model(model.tokenizer, vp_stage=vp_stage))
        model.to(groups.device)
        with files.reader() as reader:
            for chunk in model.chunks:
                load_weights(chunk, reader, shape, groups.place)
        model.architecture, model._groups, model._stages = architecture, groups, stages
        model.eval()
        return model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Decoder outputs of this stage, [S, B, hidden]: on the last stage after the final norm, else before it.

        Megatron is sequence-first; under sequence parallelism S is this rank's stripe, S / tp. With ``labels``
        the loss [B, S], as in NeMo; that needs ``output_layer=True`` in the configuration.

        Raises:
            ConfigError: labels without an output layer.
        """
        if labels is not None and not self.config.output_layer:
            raise ConfigError("labels", "need a model that was configured with `output_layer=True`", "no output layer")
        module = self.module
        post_process = module.post_process
        module.post_process = labels is not None and post_process
        try:
            with megatron_on_host():
                output: Tensor = super().forward(
                    input_ids, position_ids, attention_mask, labels, decoder_input, inference_context, packed_seq_params
                )
                return output
        finally:
            module.post_process = post_process

    @property
    def groups(self) -> ProcessGroups:
        """Where this rank stands. For a model that NeMo built, the first call is collective over all ranks."""
        if self._groups is None:
            self._groups = current_groups(sp=self.config.sequence_parallel)
        return self._groups

    @property
    def chunks(self) -> list[MCoreGPTModel]:
        """This rank's parts of the model: one, or one for each virtual stage."""
        return [self.module, *self.later_chunks]

    @property
    def stages(self) -> tuple[range, ...]:
        """Layer indices of every pipeline stage, virtual ones counted. For a model that NeMo built, in whatever way it
        split the layers, the first call is collective over all ranks."""
        if self._stages is None:
            numbers = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in self.chunks]
            own = list(zip(self.groups.place.stages, numbers, strict=True))
            everyone = all_values(own, self.groups)
            found = dict(pair for pairs in everyone for pair in pairs)
            self._stages = _contiguous(found, self.groups.topology.stages)
        return self._stages

    def capture(
        self,
        microbatches: Iterable[Microbatch],
        tokens: TokenRows,
        *,
        capture: Capture,
        sink: Sink,
        done: Callable[[Microbatch], None] = lambda microbatch: None,
    ) -> None:
        """Runs those of ``microbatches`` that fall to this replica; every slice goes to ``sink`` on the rank that
        answers for it. Collective over the tp, cp and pp groups.

        tokens: (first row, length) to token ids [length]. done: called after each microbatch of this rank.
        """
        Pipeline(self.chunks, self.groups, stages=self.stages, capture=capture).run(
            self._of_this_replica(microbatches), tokens, sink, done
        )

    def _of_this_replica(self, microbatches: Iterable[Microbatch]) -> Iterable[Microbatch]:
        place = self.groups.place
        return (each for each in microbatches if replica_of(each, place.topology.dp) == place.dp)

    @overload
    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        hook_points: str | Sequence[str],
        gather: Literal["none"],
        lengths: Sequence[int] | Tensor | None = ...,
        mask: Tensor | None = ...,
        pool: str | None = ...,
        heads: Sequence[int] | None = ...,
        most_bytes: int = ...,
        batch_tokens: int = ...,
        packing: bool = ...,
    ) -> dict[HookPoint, LocalStates]: ...

    @overload
    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        hook_points: str | Sequence[str],
        gather: Literal["rank0", "all"] = ...,
        lengths: Sequence[int] | Tensor | None = ...,
        mask: Tensor | None = ...,
        pool: str | None = ...,
        heads: Sequence[int] | None = ...,
        most_bytes: int = ...,
        batch_tokens: int = ...,
        packing: bool = ...,
    ) -> dict[HookPoint, Tensor]: ...

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        hook_points: str | Sequence[str],
        gather: Gather = "rank0",
        lengths: Sequence[int] | Tensor | None = None,
        mask: Tensor | None = None,
        pool: str | None = None,
        heads: Sequence[int] | None = None,
        most_bytes: int = MOST_BYTES,
        batch_tokens: int = 4096,
        packing: bool = True,
    ) -> dict[HookPoint, Tensor] | dict[HookPoint, LocalStates]:
        """Hidden states of a batch of ragged sequences. Collective over all ranks, which all pass the same arguments.

        Args:
            input_ids: [batch, tokens] integers, padded on the right; what the padding is does not matter.
            hook_points: such as ``["embed", "resid_post@12", "resid_post@0:24:6", "final_norm"]`` or ``"all"``.
            gather: who gets the whole: ``rank0``, ``all`` ranks, or ``none``: each rank keeps what it holds.
            lengths: tokens of each sequence; None where none is padded.
            mask: bool [batch, tokens], the tokens whose states are wanted; no others are copied. None: all.
            pool: ``last``, ``mean`` or ``weighted_mean`` (see ``plan.pooling``): one state for each sequence, over the
                tokens of ``mask``. Sums are in fp32.
            heads: attention heads whose ``attn_weights`` are wanted; None: all.
            most_bytes: refuse ``attn_weights`` that would take more, since they grow with the square of the tokens.
            batch_tokens, packing: how the batch is cut into microbatches; the result does not depend on them.

        Returns:
            {HookPoint: [batch, tokens, *shape]} in the compute dtype, zero where nothing was kept, on the ranks asked
            for and {} on the others; ``shape`` is [hidden], [heads, head_dim], ... (``plan.shapes.state_shape``, with
            as many keys as there are tokens). With ``pool`` [batch, *shape]. With ``none`` {HookPoint: LocalStates} of
            the hook points of this rank's stages, rows not reshaped.

        Raises:
            ConfigError: a hook point that the model lacks, or arguments that do not fit each other.
        """
        points = self._points(hook_points)
        ragged = _lengths(input_ids, lengths, self._vocab_size)
        if self.architecture is not None:
            self.architecture.require_length(max(ragged), "input_ids")
        if gather not in ("rank0", "all", "none"):
            raise ConfigError("gather", "must be `rank0`, `all` or `none`", gather)
        topology = self.groups.topology
        batching = Batching(
            max_tokens=input_ids.shape[1],
            batch_tokens=batch_tokens,
            packing=packing,
            multiple_of=topology.sequence_multiple,
            segment_multiple=topology.segment_multiple,
        )
        microbatches = list(plan(ragged, batching))
        rows = torch.cat([input_ids[index, :length].cpu() for index, length in enumerate(ragged)])
        buffer = SliceBuffer()
        wanted = self._capture(points, ragged, mask, pool, heads, keys=input_ids.shape[1])
        self._check_attention(wanted, ragged, most_bytes)
        self.capture(microbatches, lambda first, length: rows[first : first + length], capture=wanted, sink=buffer)
        assembler = BatchAssembler(ragged, input_ids.shape[1])
        like = torch.empty(0, dtype=self.config.params_dtype, device=self.groups.device)
        if gather == "none":
            held = {point: buffer.of(point) for point in points}
            return assembler.local({point: kept for point, kept in held.items() if kept}, like)
        shapes = {point: self._state_shape(point, wanted.attention) for point in points}
        widths = {point: prod(shape) for point, shape in shapes.items()}
        expected = holdings(microbatches, wanted, self.stages, topology)
        slices = gather_slices(buffer, expected, self.groups, widths=widths, dtype=like.dtype, pools=wanted.pools)
        whole = assembler.assemble(
            slices, {p: widths[p] for p in points if gather == "all" or self.groups.place.rank == 0}, like
        )
        if gather == "all":
            for point in points:
                dist.broadcast(whole[point], group=self.groups.world, group_src=0)
        if wanted.pools:
            ends = torch.arange(len(ragged)), torch.tensor(ragged) - 1
            whole = {point: states[ends] for point, states in whole.items()}
        return {point: states.unflatten(-1, shapes[point]) for point, states in whole.items()}

    def _capture(
        self,
        points: tuple[HookPoint, ...],
        lengths: Sequence[int],
        mask: Tensor | None,
        pool: str | None,
        heads: Sequence[int] | None,
        *,
        keys: int,
    ) -> Capture:
        """What ``hidden_states`` is asked for, its arguments checked."""
        count = self._shape.num_heads
        asked = tuple(range(count)) if heads is None else tuple(sorted(set(heads)))
        if not asked or not all(0 <= head < count for head in asked):
            raise ConfigError("heads", f"must name attention heads from 0 to {count - 1}", heads)
        attention = AttentionWeights(heads=asked, num_heads=count, keys=keys)
        return Capture(points=points, choice=choice_of(lengths, mask, pool, tokens=keys), attention=attention)

    def _check_attention(self, wanted: Capture, lengths: Sequence[int], most_bytes: int) -> None:
        layers = sum(point.site == ATTN_WEIGHTS for point in wanted.points)
        asked, choice = wanted.attention, wanted.choice
        rows = len(lengths) if wanted.pools else sum(lengths)
        if choice is not None and choice.kept is not None:
            first = accumulate(lengths, initial=0)
            rows = sum(len(choice.kept(row, n) or ()) for row, n in zip(first, lengths, strict=False))
        size = layers * rows * len(asked.heads) * asked.keys * self.config.params_dtype.itemsize
        if size > most_bytes:
            rule = f"must take at most `most_bytes` ({most_bytes:,}) for attn_weights: ask for fewer heads or tokens"
            raise ConfigError("hook_points", f"{rule}, or allow more", f"{size:,} bytes")

    def _state_shape(self, point: HookPoint, attention: AttentionWeights) -> tuple[int, ...]:
        return state_shape(point, self._shape, keys=attention.keys, heads=attention.heads)

    @property
    def _shape(self) -> DecoderShape:
        if self.architecture is not None:
            return self.architecture.shape
        config = self.config
        return DecoderShape(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            head_dim=config.kv_channels,
            ffn_hidden_size=config.ffn_hidden_size,
            vocab_size=config.vocab_size,
        )

    @property
    def _vocab_size(self) -> int:
        """Without the padding that tensor parallelism adds."""
        return self.config.vocab_size if self.architecture is None else self.architecture.shape.vocab_size

    def _points(self, hook_points: str | Sequence[str]) -> tuple[HookPoint, ...]:
        points = expand(hook_points, num_layers=self.config.num_layers, setting="hook_points")
        if not self.config.final_norm and any(point.normed for point in points):
            raise ConfigError(
                "hook_points", "must leave out `final_norm`: this model was built without it", hook_points
            )
        return points


def _contiguous(numbers: dict[int, list[int]], count: int) -> tuple[range, ...]:
    """Megatron's layer numbers (from 1) of each stage, as ranges of layer indices (from 0)."""
    stages: list[range] = []
    for stage in range(count):
        start = stages[-1].stop if stages else 0
        stages.append(range(start, start + len(numbers[stage])))
        if [index + 1 for index in stages[-1]] != numbers[stage]:
            raise ConfigError("pipeline layout", "must keep each stage's layers together and in order", numbers)
    return tuple(stages)


def _checked_stages(
    architecture: Architecture, topology: Topology, split: Split | None, *, dtype: str, num_layers: int
) -> tuple[range, ...]:
    shape = architecture.shape
    if dtype not in TORCH_DTYPES:
        raise ConfigError("dtype", f"must be one of {', '.join(TORCH_DTYPES)}", dtype)
    if not 1 <= num_layers <= shape.num_layers:
        raise ConfigError("num_layers", f"must be from 1 to {shape.num_layers}", num_layers)
    raise_all(
        model_problems(
            topology,
            num_heads=shape.num_heads,
            num_query_groups=shape.num_query_groups,
            ffn_hidden_size=shape.ffn_hidden_size,
        )
    )
    return stages_of(num_layers, pp=topology.pp, vp=topology.vp, split=split)


def _lengths(input_ids: Tensor, lengths: Sequence[int] | Tensor | None, vocab_size: int) -> list[int]:
    """Tokens of each sequence, checked against the batch."""
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.numel() == 0:
        raise ConfigError("input_ids", "must be integers of shape [batch, tokens]", list(input_ids.shape))
    ragged = [input_ids.shape[1]] * input_ids.shape[0] if lengths is None else [int(length) for length in lengths]
    if len(ragged) != input_ids.shape[0] or not all(1 <= length <= input_ids.shape[1] for length in ragged):
        rule = f"must be {input_ids.shape[0]} integers from 1 to {input_ids.shape[1]}"
        raise ConfigError("lengths", rule, ragged)
    for index, length in enumerate(ragged):
        used = input_ids[index, :length]
        if int(used.min()) < 0 or int(used.max()) >= vocab_size:
            raise ConfigError(
                "input_ids", f"must hold token ids from 0 to {vocab_size - 1} (sequence {index})", int(used.max())
            )
    return ragged
