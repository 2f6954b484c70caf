"""What there is to run on: ranks and their memory. How fast they are is ``plan.hardware``'s, and not measured anew."""

import os
import subprocess
import sys
from pathlib import Path

from nemo_qwen_hidden.config import BYTES, Settings
from nemo_qwen_hidden.parallel.launch import launched_local_rank, local_world
from nemo_qwen_hidden.plan.cost import Machine
from nemo_qwen_hidden.plan.hardware import (
    CPU_BASE_BYTES,
    GB,
    GPU_BASE_BYTES,
    GPU_HOST,
    Host,
    core_host,
    core_speeds,
    gpu_speeds,
)

_FREE_BYTES = """
import torch
print(min(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())))
"""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def find_machine(settings: Settings, *, world: int | None) -> Machine:
    """The ``world`` ranks that a launcher has started; where it is None, those that could be here: one for each GPU, or
    up to one for each usable core.

    Memory is ``parallel.memory_gb``; where that is null, what is free now. A launcher's ranks choose each by itself and
    must choose the same, so for them it is what is built in, which equal machines have alike at any moment.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return _of_gpus(settings, world, gpus) if gpus else _of_cores(settings, world)


def find_host(machine: Machine, ranks: int) -> Host:
    """What surrounds ``ranks`` ranks of ``machine``, which was found here."""
    return core_host(_cores(), min(ranks, machine.per_machine)) if machine.shared_cores else GPU_HOST


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _of_gpus(settings: Settings, world: int | None, gpus: int) -> Machine:
    return Machine(
        world=world,
        per_machine=gpus if world is None else local_world(world),
        memory_bytes=_given(settings) or _gpu_bytes(world),
        base_bytes=GPU_BASE_BYTES,
        speeds=gpu_speeds(BYTES[settings.precision.compute]),
    )


def _of_cores(settings: Settings, world: int | None) -> Machine:
    cores = _cores()
    given = _given(settings)
    return Machine(
        world=world,
        per_machine=cores if world is None else local_world(world),
        memory_bytes=given or _host_bytes("MemAvailable" if world is None else "MemTotal"),
        base_bytes=CPU_BASE_BYTES,
        speeds=core_speeds(cores),
        shared_memory=given is None,
        shared_cores=True,
    )


def _given(settings: Settings) -> int | None:
    gb = settings.parallel.memory_gb
    return None if gb is None else int(gb * GB)


def _gpu_bytes(world: int | None) -> int:
    """What is free on the fullest GPU, asked in a process of its own, since asking takes a context on each; under a
    launcher, all that this rank's GPU has."""
    import torch

    if world is not None:
        return int(torch.cuda.mem_get_info(launched_local_rank())[1])
    asked = subprocess.run([sys.executable, "-c", _FREE_BYTES], check=True, stdout=subprocess.PIPE, text=True)
    return int(asked.stdout)


def _host_bytes(field: str) -> int:
    """A field of /proc/meminfo, or what this process's control group may use, if that is less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    there = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip() if _CGROUP_LIMIT.is_file() else "max"
    return there if limit == "max" else min(there, int(limit))
