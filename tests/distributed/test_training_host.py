"""What NeMo's trainer still asks of CUDA on a machine without it; a failure here means that a stand-in can go."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from nemo_qwen_hidden.parallel.launch import Rank
from tests.conftest import Start

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins do nothing where CUDA is available")


def each_with_and_without(rank: Rank, folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """Of everything upstream that needs a stand-in, what it raises without and with them."""
    from nemo_qwen_hidden.parallel.host import cuda_type_names, no_side_stream, training_on_host

    found = {}
    for name, call in _calls(folder).items():
        helped = {"optimizer types": cuda_type_names, "side stream": no_side_stream}.get(name, training_on_host)
        found[name] = (_raised(call, nullcontext), _raised(call, helped))
    return found


def _raised(call: Callable[[], Any], inside: Callable[[], Any]) -> str | None:
    try:
        with inside():
            call()
    except Exception as error:
        return type(error).__name__
    return None


def _calls(folder: Path) -> dict[str, Callable[[], Any]]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.tensor_parallel import RowParallelLinear, random
    from megatron.core.utils import local_multi_tensor_l2_norm
    from nemo.collections.llm import peft
    from nemo.collections.llm.gpt.data.utils import _get_samples_mapping
    from nemo.collections.llm.gpt.model.base import gpt_data_step
    from nemo.lightning.io import pl

    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)

    def scale() -> None:
        optimizer.FP32Optimizer(torch.optim.SGD([parameter]), optimizer.OptimizerConfig(), lambda state: None)

    def data_step() -> None:
        from nemo_qwen_hidden.parallel.groups import process_groups
        from nemo_qwen_hidden.topology import Topology

        with process_groups(Topology()):
            gpt_data_step(iter([{"tokens": torch.ones(1, 4), "attention_mask": torch.ones(1, 4)}]))

    def samples_mapping() -> None:
        from nemo_qwen_hidden.parallel.groups import process_groups
        from nemo_qwen_hidden.topology import Topology

        with process_groups(Topology()):
            _get_samples_mapping(None, "", None, 3, 8, 0.0, 0, "", False, samples_mapping=[0, 1, 2])

    def lora() -> None:
        sizes = (True, 2, 2, True, True)
        with (
            mock.patch.object(peft.lora, "get_adapter_attributes_from_linear", lambda linear: sizes),
            mock.patch.object(peft.utils, "ParallelLinearAdapter", lambda *_, **__: torch.nn.Identity()),
        ):
            peft.LoRA(target_modules=["linear"]).transform(torch.nn.Identity(), name="linear")

    def sizes_of_lora() -> None:
        linear = RowParallelLinear.__new__(RowParallelLinear)
        torch.nn.Module.__init__(linear)
        linear.config, linear.input_size, linear.output_size = SimpleNamespace(sequence_parallel=False), 2, 2
        peft.utils.get_adapter_attributes_from_linear(linear)

    def side_stream() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            pass

    def queue() -> None:
        filesystem_async._results_queue = None
        filesystem_async._get_write_results_queue()

    return {
        "torch.zeros and Tensor.to": lambda: torch.zeros(1, device="cuda").to("cuda", non_blocking=True),
        "torch.tensor": scale,
        "norm": lambda: local_multi_tensor_l2_norm(1, None, [[torch.ones(2)]], False),
        "pinned memory": lambda: torch.tensor(1, pin_memory=True),
        "data step": data_step,
        "samples of fine-tuning data": samples_mapping,
        "synchronize": lambda: torch.cuda.synchronize(),
        "checkpoint queue": queue,
        "recompute": lambda: random._set_cuda_rng_state(random._get_cuda_rng_state()),
        "clipping": lambda: optimizer.clip_grad_by_total_norm_fp32([parameter], 1.0, 2.0),
        "loading": lambda: pl._fix_tensors_device({}),
        "LoRA": lora,
        "sizes of a LoRA": sizes_of_lora,
        "optimizer types": lambda: _require_cuda_names(parameter),
        "side stream": side_stream,
        "clipping itself": lambda: clip_grads.clip_grad_by_total_norm_fp32([parameter], 1.0, 2.0),
    }


def _require_cuda_names(parameter: torch.Tensor) -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (optimizer, distrib_optimizer):
        assert "torch.cuda.FloatTensor" in inspect.getsource(module)
    if parameter.type() != "torch.cuda.FloatTensor":
        raise TypeError(parameter.type())


def test_every_stand_in_is_needed_and_is_enough(tmp_path: Path, start_ranks: Start) -> None:
    ((found),) = start_ranks(1, each_with_and_without, tmp_path)
    # the function in its own module is not replaced: Megatron's optimizers call it by the name they have imported
    assert found.pop("clipping itself") == ("AssertionError", "AssertionError")
    for name, (alone, helped) in found.items():
        assert alone is not None, f"upstream no longer needs the stand-in for {name}"
        assert helped is None, (name, helped)


def names_before_and_after(rank: Rank) -> bool:
    from nemo_qwen_hidden.parallel.host import _forward_stand_ins, _training_stand_ins, training_on_host

    replaced = [*_forward_stand_ins(), *_training_stand_ins()]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    with training_on_host():
        inside = [getattr(owner, name) for owner, name, _ in replaced]
    after = [getattr(owner, name) for owner, name, _ in replaced]
    assert all(one is not other for one, other in zip(before, inside, strict=True))
    return before == after


def test_everything_is_as_before_afterwards(start_ranks: Start) -> None:
    assert start_ranks(1, names_before_and_after) == [True]


def strategy_of_nemo(rank: Rank) -> dict[str, bool]:
    """What of the subclasses upstream would do without."""
    from megatron.core.optimizer import get_megatron_optimizer
    from nemo.lightning import nemo_logger
    from nemo.lightning._strategy_lib import setup_megatron_optimizer

    try:
        from megatron.core.dist_checkpointing.strategies import tensorstore  # noqa: F401

        asynchronous = True
    except ImportError:
        asynchronous = False
    return {
        "optimizer": "no_weight_decay_cond" in inspect.signature(get_megatron_optimizer).parameters
        or "no_weight_decay_cond=" not in inspect.getsource(setup_megatron_optimizer),
        "asynchronous checkpoints": asynchronous,
        "logger": "HAVE_RES" in inspect.getsource(nemo_logger.NeMoLogger),
    }


def test_the_subclasses_are_needed(start_ranks: Start) -> None:
    assert start_ranks(1, strategy_of_nemo) == [
        dict.fromkeys(("optimizer", "asynchronous checkpoints", "logger"), False)
    ]
