"""How fast machines are. Rates are what can be counted on, below what a vendor's sheet names.

    H100: NVIDIA H100 SXM5 data sheet: 989 TFLOP/s bf16 and 67 fp32 (dense, without TF32), 80 GB at 3.35 TB/s, NVLink 4
        with 450 GB/s each way, PCIe 5 x16 with 64 GB/s each way. A DGX H100 has 8 of them, 112 cores, and for each GPU
        a ConnectX-7 with NDR InfiniBand: 400 Gb/s, 50 GB/s.
    CPU: measured on two cores (docs/design/0007-the-layout-that-is-chosen.md, benchmarks/scaling.py).

Taken of them: 0.6 of the products, 0.8 of memory, PCIe and InfiniBand, 2/3 of NVLink. For Qwen2.5-7B in bf16 that comes
to 0.48 of the peak, forward alone; Llama 3's training, with its backward pass and its exchanges, reports 0.38 to 0.43
(Dubey et al. 2024, table 4).
"""

from dataclasses import dataclass

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.plan.cost import Machine, Speeds

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Host:
    """What surrounds the ranks, in units a second.

    tokenize: tokens, of the one process that reads the data. copy: bytes from a rank's device to its machine. seal:
    bytes of a shard that one rank's cores read, sum and hash. machine: bytes that one machine sends to the storage, or
    reads of it. store: bytes that the storage takes from all machines, or gives.
    """

    tokenize: float
    copy: float
    seal: float
    machine: float
    store: float


# CUDA's context, workspaces of cuBLAS and buffers of NCCL; estimated
GPU_BASE_BYTES = 2_000_000_000
# by bytes of a number
GPU_FLOPS = {2: 0.6 * 989e12, 4: 0.6 * 67e12}
GPU = Speeds(flops=GPU_FLOPS[2], memory=0.8 * 3.35e12, near=3e11, far=4e10, latency=2e-5)
GPU_MEMORY_BYTES = 80 * GB
GPUS_PER_MACHINE = 8
CORES_PER_GPU = 14

# NeMo imported takes 0.6 GB of a process's own, and 256 MB of rows may wait for the disk
CPU_BASE_BYTES = 1_000_000_000
# fp32 products of one core, and elementwise steps of one; gloo through the loopback device
CORE = Speeds(flops=9e10, memory=1.5e10, near=1e9, far=1e9, latency=3e-4)
# on two busy cores: 117,000 tokens/s of Python's sources; 0.21 GB/s of bf16 summed and hashed, 0.51 of fp32
CORE_TOKENIZE = 6e4
CORE_SEAL = 3e8

# Assumed: one link of a machine leads to a file system that takes 100 GB/s. Tokenizing is bound by what one process
# does between the calls of its threads.
GPU_HOST = Host(tokenize=1e6, copy=0.8 * 64e9, seal=CORES_PER_GPU * CORE_SEAL, machine=4e10, store=1e11)
# Assumed: what a rank writes into the page cache and the disk takes
LOCAL_DISK = 1e9


def gpu_speeds(itemsize: int) -> Speeds:
    """Of one GPU, for numbers of ``itemsize`` bytes."""
    return Speeds(flops=GPU_FLOPS[itemsize], memory=GPU.memory, near=GPU.near, far=GPU.far, latency=GPU.latency)


def gpu_machines(gpus: int, *, itemsize: int, memory_bytes: int | None = None) -> Machine:
    """``gpus`` H100s, eight in a machine. memory_bytes: of each, None for all that it has.

    Raises:
        ConfigError: more than one machine, and not all full.
    """
    if gpus < 1 or (gpus > GPUS_PER_MACHINE and gpus % GPUS_PER_MACHINE):
        raise ConfigError("--gpus", f"must be 1 to {GPUS_PER_MACHINE}, or a multiple of {GPUS_PER_MACHINE}", gpus)
    return Machine(
        world=gpus,
        per_machine=min(gpus, GPUS_PER_MACHINE),
        memory_bytes=GPU_MEMORY_BYTES if memory_bytes is None else memory_bytes,
        base_bytes=GPU_BASE_BYTES,
        speeds=gpu_speeds(itemsize),
    )


def core_speeds(cores: int) -> Speeds:
    """Of a machine's ``cores``. Two were seen to move hardly more bytes than one."""
    return Speeds(flops=CORE.flops * cores, memory=CORE.memory, near=CORE.near, far=CORE.far, latency=CORE.latency)


def core_host(cores: int, ranks: int) -> Host:
    """Of a machine whose ``ranks`` share its ``cores`` and compute where they write."""
    seal = CORE_SEAL * cores / ranks
    return Host(tokenize=CORE_TOKENIZE * cores, copy=CORE.memory, seal=seal, machine=LOCAL_DISK, store=LOCAL_DISK)
