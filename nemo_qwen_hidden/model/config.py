"""NeMo's configuration of a Qwen2 whose stages end in hidden states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.transformer.spec_utils import build_module
from nemo.collections.llm.gpt.model.base import get_packed_seq_params
from nemo.collections.llm.gpt.model.qwen2 import Qwen2Config
from torch import Tensor

from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.errors import raise_all
from nemo_qwen_hidden.model.spec import decoder_spec
from nemo_qwen_hidden.model.weights import load_weights
from nemo_qwen_hidden.plan.footprint import padded_vocab
from nemo_qwen_hidden.plan.stages import megatron_layout
from nemo_qwen_hidden.topology import Topology, vocabulary_problems

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Qwen2HiddenConfig(Qwen2Config):
    """A Qwen2 without an output layer, unless ``output_layer`` asks for NeMo's usual model (for fine-tuning).

    num_layers may be less than the checkpoint has: the decoder then ends there, ``final_norm`` says whether the
    final norm follows. weights: a model folder that each stage is filled from as it is built, wherever NeMo
    builds it; None leaves that to the caller. state_losses: of ``training.losses.kinds``; their heads become
    submodules of the chunk that has their hook point.
    """

    transformer_layer_spec: Callable[..., Any] = decoder_spec
    output_layer: bool = False
    final_norm: bool = True
    weights: str | None = None
    state_losses: tuple[Any, ...] = ()

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MCoreGPTModel:
        """This rank's stage. With ``post_process`` disabled Megatron builds no output layer, but no final norm
        either; the norm is put back on the last stage, so that the decoder's output is the normed state."""
        if self.output_layer:
            model: MCoreGPTModel = super().configure_model(tokenizer, pre_process, post_process, vp_stage)
        else:
            model = self._without_output_layer(pre_process, vp_stage)
        if self.weights is not None:
            self._fill(model, Path(self.weights))
        for loss in self.state_losses:
            loss.add_head(model, self)
        return model

    def _fill(self, model: MCoreGPTModel, folder: Path) -> None:
        architecture = read_architecture(folder)
        weights = open_weights(folder, architecture)
        place = Topology(tp=self.tensor_model_parallel_size).at(parallel_state.get_tensor_model_parallel_rank())
        with weights.reader() as reader:
            load_weights(model, reader, architecture.shape, place)

    def _without_output_layer(self, pre_process: bool | None, vp_stage: int | None) -> MCoreGPTModel:
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage or 0)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage or 0)
        spec = self.transformer_layer_spec(self, vp_stage=vp_stage or 0)
        model = MCoreGPTModel(
            self,
            transformer_layer_spec=spec,
            vocab_size=self.vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=first if pre_process is None else pre_process,
            post_process=False,
            position_embedding_type="rope",
            rotary_base=self.rotary_base,
            vp_stage=vp_stage,
        )
        if last and self.final_norm:
            model.decoder.final_layernorm = build_module(
                spec.layer_norm, config=self, hidden_size=self.hidden_size, eps=self.layernorm_epsilon
            )
        return model


def configure(
    architecture: Architecture,
    topology: Topology,
    *,
    dtype: str,
    stages: Sequence[range],
    final_norm: bool = True,
    **more: Any,
) -> Qwen2HiddenConfig:
    """NeMo's configuration for the first layers of a checkpoint in a layout, divided as ``stages`` says.

    Megatron's default stages need a number of layers that pp divides; ours are given to it explicitly.

    more: of NeMo's configuration, instead of what is chosen here.
    """
    shape, compute = architecture.shape, TORCH_DTYPES[dtype]
    gpu = torch.cuda.is_available()
    chosen = dict(
        num_layers=stages[-1].stop,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        vocab_size=padded_vocab(shape, topology.tp),
        seq_length=architecture.max_positions,
        layernorm_epsilon=architecture.norm_epsilon,
        rotary_base=architecture.rotary_base,
        share_embeddings_and_output_weights=architecture.tied,
        final_norm=final_norm,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vp if topology.vp > 1 else None,
        pipeline_model_parallel_layout=megatron_layout(stages) if topology.pp > 1 else None,
        context_parallel_size=topology.cp,
        sequence_parallel=topology.sp,
        params_dtype=compute,
        pipeline_dtype=compute,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        # weights are read from files, straight into uninitialised parameters
        perform_initialization=False,
        use_cpu_initialization=not gpu,
        # megatron-core 0.16.1's fused kernels are CUDA's; each falls back or fails on a CPU
        gradient_accumulation_fusion=False,
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=gpu,
        batch_p2p_sync=gpu,
    )
    return Qwen2HiddenConfig(**chosen | more)


def configure_training(
    folder: Path, topology: Topology, *, stages: Sequence[range], dtype: str = "fp32", **more: Any
) -> Qwen2HiddenConfig:
    """NeMo's configuration for fine-tuning a checkpoint in a layout, starting from its weights.

    Args:
        folder: of Hugging Face's or NeMo's form.
        stages: layer indices of every stage, see ``plan.stages.stages_of``.
        more: of NeMo's configuration, such as ``seq_length`` or ``recompute_granularity``. They have to be given here:
            NeMo builds further virtual stages from what the constructor was given, not from what was set later.

    Raises:
        ConfigError: the vocabulary would have to be padded; the padding would take part in the loss.
    """
    architecture = read_architecture(folder)
    raise_all(vocabulary_problems(topology, architecture.shape.vocab_size))
    wanted: dict[str, Any] = dict(
        output_layer=True,
        weights=str(folder),
        # Megatron marks what is split over tp while it initialises; norms of gradients and the optimizer go by that.
        perform_initialization=True,
        init_method=left_as_made,
        output_layer_init_method=left_as_made,
        forward_step_fn=causal_forward_step,
        cross_entropy_loss_fusion=torch.cuda.is_available(),
        # Two ranks that send each other states and gradients at once would mistake one for the other in a batch:
        # Megatron's own command line asks for this too (training/arguments.py, "avoid having multiple p2p sends").
        overlap_p2p_comm=topology.vp > 1,
        batch_p2p_comm=topology.vp == 1,
        # Then an output is freed while gloo may still have to read it; NCCL's sends stand in its stream already.
        deallocate_pipeline_outputs=topology.vp == 1 or torch.cuda.is_available(),
    )
    return configure(architecture, topology, dtype=dtype, stages=stages, **wanted | more)


def left_as_made(weight: Tensor) -> Tensor:
    """Initialisation of a weight that is read from a file afterwards."""
    return weight


def causal_forward_step(model: Any, batch: dict[str, Any]) -> Tensor:
    """NeMo's forward step of a GPT, which does not have to be given an attention mask: ours and Transformer Engine's
    attention are causal without one, where NeMo's own step asks for it (NeMo 2.7.3,
    ``collections/llm/gpt/model/base.py:135``). Documents of a pack (``cu_seqlens``) do not see each other, and
    what a mask hides is not seen, as in NeMo's."""
    packs = get_packed_seq_params(batch) if "cu_seqlens" in batch else None
    output: Tensor = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=batch.get("attention_mask"),
        labels=batch["labels"],
        packed_seq_params=packs,
    )
    return output
