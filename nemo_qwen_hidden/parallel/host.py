"""Megatron-Core and NeMo on a machine without a GPU.

Every stand-in is here, is entered explicitly, is undone on the way out, and does nothing where CUDA is available.
Each names the upstream version that it is for; ``tests/distributed/test_host.py`` and ``test_training_host.py`` fail
when upstream stops needing it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from multiprocessing import dummy as threads
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rotary_pos_embedding
from torch import Tensor

Replacement = tuple[Any, str, Any]


def device() -> torch.device:
    """The device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def megatron_on_host() -> Iterator[None]:
    """While entered, ``torch.cuda.current_device()`` answers with the CPU device.

    megatron-core 0.16.1 asks it for the device of new tensors: ``rotary_pos_embedding.py:162``,
    ``tensor_parallel/mappings.py:91,141,181``, ``tensor_parallel/layers.py:552``, ``utils.py:631``. Under context
    parallelism it pins memory and copies it to the GPU to choose rotary embeddings (``rope_utils.py:62``). It moves the
    output layer's weight to the GPU where the last stage shares it with the first (``language_module.py:244``).
    """
    with _replaced(_forward_stand_ins):
        yield


@contextmanager
def training_on_host() -> Iterator[None]:
    """While entered, a NeMo Trainer can train, validate, save and resume over gloo: ``megatron_on_host`` and, of
    megatron-core 0.16.1 (M) and NeMo 2.7.3 (N),

    - ``torch.zeros`` and ``torch.tensor`` take ``device="cuda"`` for the CPU, and ``pin_memory`` for nothing; so does
      ``Tensor.to("cuda")`` (M ``pipeline_parallel/schedules.py:596,983,2138``, ``optimizer/optimizer.py:907``,
      ``optimizer/clip_grads.py:103,172``, ``utils.py:1207``; N, in ``lightning/pytorch``,
      ``strategies/megatron_strategy.py:801,881`` and ``plugins/data_sampler.py:192,212``);
    - ``Tensor.cuda`` gives the tensor itself (N ``collections/llm/gpt/model/base.py:103``), and
      ``torch.cuda.LongTensor`` is one of the CPU (N ``collections/llm/gpt/data/utils.py:777``, fine-tuning data);
    - ``torch.cuda.synchronize`` returns (M ``dist_checkpointing/strategies/filesystem_async.py:230``);
    - the files of a checkpoint are written by threads, as ``multiprocessing.dummy`` has them: Megatron would fork
      processes, which ranks that are daemons may not, and start the main script anew for a queue (M
      ``dist_checkpointing/strategies/filesystem_async.py:54,266``);
    - recomputation keeps no state of a CUDA generator (M ``tensor_parallel/random.py:55,86``); of the CPU's it does;
    - gradients are clipped as if they were on a GPU (M ``optimizer/clip_grads.py:167`` asserts it);
    - loaded tensors stay where they are (N ``lightning/io/pl.py:495`` asserts that CUDA is initialised);
    - a linear layer that gets a LoRA is none of Transformer Engine's, which NeMo asks of it also where that is not
      installed (N ``collections/llm/peft/lora.py:703``, ``utils.py:77``).
    """
    with megatron_on_host(), _replaced(_training_stand_ins):
        yield


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """While entered, ``Tensor.type()`` names the CUDA type of a dtype, which megatron-core 0.16.1's optimizers choose
    by: ``optimizer/optimizer.py:671,690``, ``distrib_optimizer.py:361,420,582``, ``clip_grads.py:167``."""
    with _replaced(lambda: [(Tensor, "type", _cuda_type_name(Tensor.type))]):
        yield


@contextmanager
def no_side_stream() -> Iterator[None]:
    """While entered, a CUDA stream is none, on which NeMo 2.7.3 wraps the model for data parallelism
    (``lightning/megatron_parallel.py:617``)."""
    with _replaced(lambda: [(torch.cuda, "Stream", lambda *_, **__: None)]):
        yield


@contextmanager
def _replaced(stand_ins: Callable[[], list[Replacement]]) -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins():
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def _forward_stand_ins() -> list[Replacement]:
    return [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _rotary_of_cp_rank),
    ]


def _training_stand_ins() -> list[Replacement]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import optimizer
    from megatron.core.tensor_parallel import random
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as peft
    from nemo.lightning.io import pl

    return [
        (torch, "zeros", _on_cpu(torch.zeros)),
        (torch, "tensor", _on_cpu(torch.tensor)),
        (Tensor, "to", _to_cpu(Tensor.to)),
        (torch.cuda, "synchronize", _nothing),
        (torch.cuda, "LongTensor", torch.LongTensor),
        (filesystem_async, "mp", SimpleNamespace(get_context=lambda method: threads)),
        (random, "_get_cuda_rng_state", _nothing),
        (random, "_set_cuda_rng_state", _nothing),
        (optimizer, "clip_grad_by_total_norm_fp32", _with_cuda_names(optimizer.clip_grad_by_total_norm_fp32)),
        (pl, "_fix_tensors_device", lambda tensors: tensors),
        (lora, "te", SimpleNamespace(Linear=type("Linear", (), {}))),
        (peft, "HAVE_TE", False),
    ]


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _names_cuda(where: Any) -> bool:
    return (isinstance(where, str) and where.startswith("cuda")) or (
        isinstance(where, torch.device) and where.type == "cuda"
    )


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made


def _to_cpu(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(to)
    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and _names_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(tensor, *args, **kwargs)

    return moved


def _cuda_type_name(type_of: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(type_of)
    def named(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = type_of(tensor, *args, **kwargs)
        return given.replace("torch.", "torch.cuda.", 1) if isinstance(given, str) else given

    return named


def _with_cuda_names(clip: Callable[..., None]) -> Callable[..., None]:
    @wraps(clip)
    def clipped(*args: Any, **kwargs: Any) -> None:
        with cuda_type_names():
            clip(*args, **kwargs)

    return clipped


def _rotary_of_cp_rank(rotary: Tensor, dimension: int, cp: dist.ProcessGroup) -> Tensor:
    """The chunks of a context-parallel rank, as Megatron chooses them."""
    chunks = rotary.chunk(2 * cp.size(), dim=dimension)
    return torch.cat([chunks[cp.rank()], chunks[2 * cp.size() - 1 - cp.rank()]], dim=dimension)
