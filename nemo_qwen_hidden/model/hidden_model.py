"""Qwen2HiddenModel: NeMo's Qwen2 whose stages give hidden states instead of logits."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo import lightning as _  # noqa: F401 - before nemo.core, or its registry misses the tokenizer (NeMo 2.7.3)
from nemo.collections.llm.gpt.model.qwen2 import Qwen2Model
from torch import Tensor, nn

from nemo_qwen_hidden.capture.pipeline import Pipeline, TokenRows
from nemo_qwen_hidden.capture.staging import staged
from nemo_qwen_hidden.capture.taps import Capture, Sink
from nemo_qwen_hidden.checkpoint.adapter import Adapter, MergedReader
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.nemo_tensors import NemoTensors
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.checkpoint.tensors import OUTPUT, Reader
from nemo_qwen_hidden.errors import CheckpointError, ConfigError, raise_all
from nemo_qwen_hidden.model.config import TORCH_DTYPES, Qwen2HiddenConfig, configure
from nemo_qwen_hidden.model.effects import EffectCalls
from nemo_qwen_hidden.model.nemo_weights import load_nemo_weights
from nemo_qwen_hidden.model.stages import held_stages, unwrapped
from nemo_qwen_hidden.model.weights import load_weights
from nemo_qwen_hidden.parallel.groups import ProcessGroups, current_groups, has_groups, one_rank
from nemo_qwen_hidden.parallel.host import megatron_on_host
from nemo_qwen_hidden.plan.microbatches import Microbatch
from nemo_qwen_hidden.plan.stages import Split, stages_of
from nemo_qwen_hidden.topology import Topology, model_problems
from nemo_qwen_hidden.trace.record import UNTRACED, Trace


class Qwen2HiddenModel(EffectCalls, Qwen2Model):
    """One rank's part of a Qwen2 or Qwen2.5, under any layout of tensor, pipeline (with virtual stages), context,
    sequence and data parallelism.

    ``forward`` keeps NeMo's signature and gives decoder outputs; ``hidden_states`` gives the states of any hook point.
    A LightningModule like its parent, with NeMo's optimizer and data steps, so that it can be fine-tuned where
    its configuration says ``output_layer=True``.
    """

    config: Qwen2HiddenConfig

    def __init__(
        self,
        config: Qwen2HiddenConfig,
        # one by one: from what it was built with, NeMo builds the model of each further virtual stage (io.reinit)
        optim: Any = None,
        tokenizer: Any = None,
        model_transform: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__(config, optim=optim, tokenizer=tokenizer, model_transform=model_transform)
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
        adapter: str | Path | None = None,
    ) -> "Qwen2HiddenModel":
        """Builds this rank's part of a checkpoint and reads its weights. Collective over all ranks where ``groups`` is
        None.

        Args:
            path: a folder with config.json and safetensors, or a hub id, or a NeMo 2 checkpoint; None is the embedded
                demo model.
            groups: where this rank stands. None joins the process groups that there are (those of NeMo without
                sequence parallelism), or makes a single rank's.
            dtype: of weights and activations: fp32, bf16 or fp16.
            num_layers: keep only the first so many layers; the pipeline is then split over these.
            final_norm: keep the final norm; only with all layers.
            output_layer: keep NeMo's output layer too, so that ``forward`` with labels gives the loss.
            split: how the layers are divided into stages; None: evenly.
            adapter: a NeMo checkpoint of a LoRA adapter, merged into the weights in fp32 and rounded once.

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
        weights = open_weights(folder, architecture)
        changes = None if adapter is None else Adapter.of(adapter, shape)
        if output_layer and not architecture.tied and OUTPUT not in weights.names:
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
        model.architecture, model._groups, model._stages = architecture, groups, stages
        if isinstance(weights, NemoTensors):
            load_nemo_weights(model.chunks, weights, groups.place, changes)
        else:
            with weights.reader() as files:
                reader: Reader = files if changes is None else MergedReader(files, changes)
                for chunk in model.chunks:
                    load_weights(chunk, reader, shape, groups.place)
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
        module = unwrapped(self.module)
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
        """This rank's parts of the model: one, or one for each virtual stage.

        Raises:
            ConfigError: NeMo has built the virtual stages as models of their own, of which this is one.
        """
        chunks, virtual = [self.module, *self.later_chunks], self.groups.topology.vp
        if len(chunks) != virtual:
            rule = f"must have the parts of all {virtual} virtual stages of its rank, as from_pretrained builds them"
            raise ConfigError("the model", rule, f"{len(chunks)} of them")
        return chunks

    @property
    def stages(self) -> tuple[range, ...]:
        """Layer indices of every pipeline stage, virtual ones counted. For a model that NeMo built, in whatever way it
        split the layers, the first call is collective over all ranks."""
        if self._stages is None:
            self._stages = held_stages(self.chunks, self.groups)
        return self._stages

    def capture(
        self,
        microbatches: Iterable[Microbatch],
        tokens: TokenRows,
        *,
        capture: Capture,
        sink: Sink,
        done: Callable[[Microbatch], None] = lambda microbatch: None,
        trace: Trace = UNTRACED,
    ) -> None:
        """Runs those of ``microbatches`` that fall to this replica; every slice goes to ``sink``, in the CPU's memory,
        on the rank that answers for it. Collective over the tp, cp and pp groups.

        tokens: (first row, length) to token ids [length]. done: called after each microbatch of this rank, whose last
        slices may still be on their way from a GPU. trace: is told what this rank does when.
        """
        mine = self.of_this_replica(microbatches)
        pipeline = Pipeline(self.chunks, self.groups, stages=self.stages, capture=capture, trace=trace)
        with staged(sink, self.groups.device) as on_host:
            pipeline.run(mine, tokens, on_host, done)


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
