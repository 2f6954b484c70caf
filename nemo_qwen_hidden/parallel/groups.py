"""Process groups of one rank, as a value that is passed down; Megatron's global parallel state is touched only here."""

import atexit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch.distributed import FileStore, HashStore  # type: ignore[attr-defined]

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.host import device
from nemo_qwen_hidden.parallel.launch import launched_local_rank, launched_world
from nemo_qwen_hidden.topology import Place, Topology

TIMEOUT_SECS = 600
_OPEN: list["ProcessGroups"] = []  # of process_groups while it is open, as Megatron's own state is: one a process
CONTROL_TIMEOUT_DAYS = 30


@dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """Where this rank stands, and the groups that it is in.

    world: all ranks. tp: the ranks that share this rank's layers, documents and tokens. cp: those that share its layers
    and documents, and have other tokens of them. tp_cp: both together. pp: the pipeline ranks of its replica. pp_wrap:
    the same, for what the last sends to the first where there are virtual stages. control: all ranks, on the CPU, for
    small values; it waits for days, since a rank may tokenize for hours.
    """

    place: Place
    world: dist.ProcessGroup
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    tp_cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    pp_wrap: dist.ProcessGroup
    control: dist.ProcessGroup
    device: torch.device

    @property
    def topology(self) -> Topology:
        return self.place.topology


@contextmanager
def process_groups(
    topology: Topology, *, rank: int | None = None, rendezvous: Path | None = None, timeout_secs: float = TIMEOUT_SECS
) -> Iterator[ProcessGroups]:
    """Makes the process groups of ``topology`` and takes them away again. Collective over all ranks.

    Without ``rank``: under torchrun its environment is used; otherwise the topology must have one rank.
    ``rendezvous`` goes with ``rank``: a file that does not exist yet, on a disk that all ranks share.

    Raises:
        ConfigError: the ranks that there are do not match the topology, or have different ones, or process groups exist
            already.
    """
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed",
            "must not be initialised yet; use current_groups() to join what is there",
            "initialised",
        )
    launched = launched_world() is not None
    if rank is not None and rendezvous is None:
        raise ConfigError("rendezvous", "must name a file where the ranks meet, when `rank` is given", None)
    if rank is None and not launched and topology.world > 1:
        raise ConfigError(
            "parallel", "must be one rank in a process that no launcher started (use torchrun)", str(topology)
        )
    if torch.cuda.is_available():
        _choose_device((launched_local_rank() or 0) if rank is None else rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_secs)
    if rank is not None:
        store = FileStore(str(rendezvous), topology.world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=topology.world, timeout=timeout)
    elif launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        groups = _make_groups(topology, timeout_secs)
        _OPEN.append(groups)
        yield groups
    finally:
        _OPEN.clear()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def launched_ranks() -> Iterator[None]:
    """While entered, the ranks that a launcher has started are torch.distributed's default group, and nothing more:
    NeMo's strategy goes on from there (``lightning/pytorch/strategies/megatron_strategy.py:626`` of 2.7.3). Collective
    over all ranks.

    Raises:
        ConfigError: there are more ranks on a machine than it has GPUs.
    """
    if torch.cuda.is_available():
        _choose_device(launched_local_rank() or 0)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _choose_device(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        rule = f"must ask for at most as many ranks on a machine as it has GPUs ({torch.cuda.device_count()})"
        raise ConfigError("parallel", rule, f"rank {local_rank} of this machine")
    torch.cuda.set_device(local_rank)


def current_groups(*, sp: bool = False) -> ProcessGroups:
    """Those of the ``process_groups`` that is open, else what Megatron's parallel state has now, as in a NeMo training
    run; then collective over all ranks, since it makes the control group.

    ``sp``: whether the model splits the sequence over the tp axis, which Megatron's parallel state does not know.

    Raises:
        ConfigError: there are none, or their ranks stand in another order than Megatron's default.
    """
    if _OPEN:
        return _OPEN[0]
    if not has_groups():
        raise ConfigError("process groups", "must have been made, e.g. with `process_groups(Topology(tp=2))`", None)
    tp, pp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    cp, tp_cp = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_and_context_parallel_group()
    world = dist.group.WORLD
    if world is None or tp is None or pp is None or cp is None or tp_cp is None:
        raise ConfigError("process groups", "must include this rank in a tp, a cp and a pp group", None)
    topology = Topology(
        tp=tp.size(),
        pp=pp.size(),
        vp=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        cp=cp.size(),
        dp=dist.get_world_size() // (tp.size() * cp.size() * pp.size()),
        sp=sp,
    )
    place = topology.at(dist.get_rank())
    own = tp.rank(), cp.rank(), pp.rank()
    if own != (place.tp, place.cp, place.pp):
        raise ConfigError("order of the parallel axes", "must be Megatron's default, tp-cp-ep-dp-pp", "another")
    wrap = _pipeline_groups(topology)[place.tp, place.cp, place.dp] if topology.vp > 1 else pp
    control = dist.new_group(backend="gloo", timeout=timedelta(days=CONTROL_TIMEOUT_DAYS))
    return ProcessGroups(
        place=place, world=world, tp=tp, cp=cp, tp_cp=tp_cp, pp=pp, pp_wrap=wrap, control=control, device=device()
    )


def _pipeline_groups(topology: Topology) -> dict[tuple[int, int, int], dist.ProcessGroup]:
    """A second pipeline group for each place on the tp, cp and dp axes. Collective over all ranks."""
    made = {}
    for tp, cp, dp in product(range(topology.tp), range(topology.cp), range(topology.dp)):
        ranks = [topology.rank(tp=tp, cp=cp, dp=dp, pp=pp) for pp in range(topology.pp)]
        made[tp, cp, dp] = dist.new_group(ranks)
    return made


def has_groups() -> bool:
    """Whether this process has process groups and Megatron's parallel state."""
    return dist.is_initialized() and parallel_state.is_initialized()


def one_rank() -> ProcessGroups:
    """Process groups of a single rank that last as long as the process, for interactive use."""
    stack = ExitStack()
    groups = stack.enter_context(process_groups(Topology()))

    def close() -> None:
        if dist.is_initialized():  # unless the user has taken them away already
            stack.close()

    atexit.register(close)
    return groups


def _require_agreement(topology: Topology) -> None:
    """Ranks with different layouts would wait for each other while groups are made. Collective over all ranks."""
    layouts: list[str] = [""] * topology.world
    dist.all_gather_object(layouts, str(topology))
    others = sorted(set(layouts) - {str(topology)})
    if others:
        raise ConfigError(
            "parallel", f"must be the same on every rank (others have {', '.join(others)})", str(topology)
        )


def _make_groups(topology: Topology, timeout_secs: float) -> ProcessGroups:
    if dist.get_world_size() != topology.world:
        raise ConfigError(
            "parallel", f"must multiply to the number of ranks started ({dist.get_world_size()})", str(topology)
        )
    _require_agreement(topology)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vp if topology.vp > 1 else None,
        context_parallel_size=topology.cp,
        distributed_timeout_minutes=max(1, round(timeout_secs / 60)),
    )
    # Megatron's own switch to a tracker whose fork does nothing: a forward without dropout draws no random numbers,
    # and the default tracker (tensor_parallel/random.py:248) wants a CUDA generator seeded first.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    return current_groups(sp=topology.sp)
