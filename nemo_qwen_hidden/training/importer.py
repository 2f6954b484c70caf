"""NeMo's own importer of Qwen2 from Hugging Face, on a machine with Transformer Engine or without.

``register_importer`` makes ``llm.import_ckpt`` use it; nothing is registered by importing this module.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nemo import lightning as nl
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.model.qwen2 import HFQwen2Importer, Qwen2Config, Qwen2Model
from nemo.lightning import io

from nemo_qwen_hidden.checkpoint.adapter import Adapter
from nemo_qwen_hidden.model.spec import decoder_spec, transformer_engine_runs
from nemo_qwen_hidden.parallel.host import training_on_host
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.parallel.watch import Pulse
from nemo_qwen_hidden.topology import Topology
from nemo_qwen_hidden.training.ranks import as_if_torchrun
from nemo_qwen_hidden.training.strategy import megatron_strategy

_LAYER = "decoder.layers.*."
_LOCAL_NAMES = {
    f"{_LAYER}self_attention.linear_qkv.layer_norm_weight": f"{_LAYER}input_layernorm.weight",
    f"{_LAYER}mlp.linear_fc1.layer_norm_weight": f"{_LAYER}pre_mlp_layernorm.weight",
}


def register_importer() -> None:
    """From now on ``llm.import_ckpt`` imports Qwen2 from ``hf://`` by ``QwenImporter``."""
    io.model_importer(Qwen2Model, "hf")(QwenImporter)


def import_huggingface(source: Path, to: Path, adapter: Adapter | None = None) -> None:
    """Writes a NeMo checkpoint of a Hugging Face folder, in this process, as one rank. Where there is a GPU that NeMo's
    Transformer Engine runs on, NeMo's importer is used as it is.

    adapter: is merged into what transformers has read, before it is imported.
    """
    with tempfile.TemporaryDirectory(prefix="nemo_qwen_hidden-") as folder:
        rank = Rank(rank=0, world=1, rendezvous=Path(folder) / "rendezvous", send=lambda event: None, pulse=Pulse())
        # NeMo tears its trainer down at the end alone: what fails on the way would leave groups and stand-ins behind
        with as_if_torchrun(rank), _without_groups_afterwards(), training_on_host():
            kind = HFQwen2Importer if transformer_engine_runs() else QwenImporter
            importer = kind(str(source))
            importer.rendezvous, importer.folder = rank.rendezvous, Path(folder)
            convert_state = importer.convert_state

            def merged(model: Any, target: Any) -> Any:
                if adapter is not None:
                    _merge(model, adapter)
                return convert_state(model, target)

            with mock.patch.object(importer, "convert_state", merged):
                importer.apply(to)


def _merge(model: torch.nn.Module, adapter: Adapter) -> None:
    """Into a model of transformers: added in fp32, rounded once."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if (ours := name.removeprefix("model.")) in adapter:
                weight.copy_(weight.float() + adapter.change(ours))


class QwenImporter(HFQwen2Importer):
    """NeMo's importer, which fills the norms of Megatron's local layers too.

    NeMo 2.7.3 names Transformer Engine's fused norms alone (``collections/llm/gpt/model/qwen2.py:222``); a name that a
    model does not have is passed over with a warning (``lightning/io/state.py:382``), and the norms keep their ones.
    The checkpoint's context is the one that NeMo's importer would write: it opens where there is Transformer Engine.
    """

    rendezvous: Path | None = None
    folder: Path | None = None  # for the tokenizer until it is in the checkpoint; None: one that stays

    def nemo_setup(self, model: Any, trainer: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As NeMo's, with a strategy that does without a GPU until NeMo tears it down, when all is saved."""
        if trainer is None:
            dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.config.params_dtype, "fp32")
            strategy = megatron_strategy(
                Topology(),
                dtype=dtype,
                rendezvous=self.rendezvous,
                ckpt_save_optimizer=False,
                always_save_context=True,
            )
            trainer = nl.Trainer(
                devices=1, accelerator="cpu", strategy=strategy, logger=False, enable_checkpointing=False
            )
        return super().nemo_setup(model, trainer, *args, **kwargs)

    def convert_state(self, source: Any, target: Any) -> Any:
        """As NeMo's, under the names that the model has."""
        with mock.patch.object(io, "apply_transforms", _with_names_of(target, io.apply_transforms)):
            return super().convert_state(source, target)

    @property
    def config(self) -> Qwen2Config:
        """As NeMo's; what only this process needs is not written into the context. Without Transformer Engine NeMo's
        layers have norms in fp32 whatever the dtype (Megatron 0.16.1, ``transformer/torch_norm.py``), which it then
        refuses to fill in another (``lightning/io/state.py:232``)."""
        config = super().config
        config.transformer_layer_spec = decoder_spec
        config.use_cpu_initialization = True
        config.gradient_accumulation_fusion = False
        return config

    @property
    def tokenizer(self) -> AutoTokenizer:
        """As NeMo's, saved in a folder of its own: NeMo takes one fixed folder for all imports of a machine
        (``lightning/io/connector.py: save_hf_tokenizer_assets``)."""
        folder = (self.folder or Path(tempfile.mkdtemp(prefix="nemo_qwen_hidden-"))) / "nemo_tokenizer"
        return AutoTokenizer(self.save_hf_tokenizer_assets(str(self), str(folder)))


def _with_names_of(model: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
    """``apply_transforms`` with norms under the names that ``model`` has."""
    local = any(name.endswith("pre_mlp_layernorm.weight") for name, _ in model.named_parameters())

    def applied(source: Any, target: Any, mapping: dict[str, str], transforms: list[Any], **kwargs: Any) -> Any:
        named = {theirs: _LOCAL_NAMES.get(ours, ours) if local else ours for theirs, ours in mapping.items()}
        return apply(source, target, mapping=named, transforms=transforms, **kwargs)

    return applied


@contextmanager
def _without_groups_afterwards() -> Iterator[None]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    try:
        yield
    finally:
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
