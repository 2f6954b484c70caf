"""NeMo's strategy for a layout, on a GPU or without one."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron.core.tensor_parallel.random import initialize_rng_tracker
from nemo.lightning import MegatronStrategy
from torch import cuda
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.model.config import TORCH_DTYPES
from nemo_qwen_hidden.parallel.host import no_side_stream, training_on_host
from nemo_qwen_hidden.plan.stages import megatron_layout
from nemo_qwen_hidden.topology import Topology


def megatron_strategy(
    topology: Topology,
    *,
    stages: Sequence[range] | None = None,
    dtype: str = "fp32",
    rendezvous: Path | Store | None = None,
    **kwargs: Any,
) -> MegatronStrategy:
    """NeMo's ``MegatronStrategy`` in a layout; without a GPU ``HostMegatronStrategy``.

    Args:
        stages: layer indices of each pipeline stage, as the model's configuration has them; None: Megatron divides the
            layers evenly.
        dtype: of what pipeline stages send each other.
        rendezvous: where the ranks meet: a file that does not exist yet, or the store of a launcher; None: the
            launcher's environment says where.
        kwargs: the strategy's own arguments.

    Raises:
        ConfigError: an argument that needs a GPU, without one.
    """
    layout = None if stages is None or topology.pp == 1 else megatron_layout(stages)
    kind = MegatronStrategy if cuda.is_available() else HostMegatronStrategy
    strategy = kind(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vp if topology.vp > 1 else None,
        context_parallel_size=topology.cp,
        sequence_parallel=topology.sp,
        pipeline_model_parallel_layout=layout,
        pipeline_dtype=TORCH_DTYPES[dtype],
        **kwargs,
    )
    if rendezvous is not None:
        own = isinstance(rendezvous, Path)
        strategy.store = FileStore(str(rendezvous), topology.world) if own else rendezvous
    return strategy


class HostMegatronStrategy(MegatronStrategy):
    """NeMo's strategy over gloo. From the moment that it sets up its ranks until it is torn down, the stand-ins of
    ``parallel.host`` are active.

    Checkpoints are written while training waits: megatron-core 0.16 has no ``strategies.tensorstore``, which NeMo 2.7.3
    imports for its asynchronous ones (``utils/callbacks/dist_ckpt_io.py:39``).

    Raises:
        ConfigError: ``ckpt_async_save``.
    """

    def __init__(self, *, ckpt_async_save: bool = False, **kwargs: Any) -> None:
        if ckpt_async_save:
            raise ConfigError("ckpt_async_save", "must be false without a GPU", True)
        super().__init__(process_group_backend="gloo", ckpt_async_save=False, **kwargs)
        self._stand_ins = ExitStack()

    def setup_environment(self) -> None:
        """As NeMo's. Megatron's tracker of random numbers is one that never forks: the usual one
        (``tensor_parallel/random.py:248`` of 0.16.1) wants a CUDA generator seeded first."""
        self._stand_ins.enter_context(training_on_host())
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        super().setup_environment()

    def init_model_parallel(self) -> None:
        """As NeMo's."""
        with no_side_stream():
            super().init_model_parallel()

    def teardown(self) -> None:
        """As NeMo's."""
        try:
            super().teardown()
        finally:
            self._stand_ins.close()
