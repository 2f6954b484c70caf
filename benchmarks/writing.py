"""Writing a store against ``dd`` with ``conv=fsync`` of the same bytes into the same folder, in turn:

    python benchmarks/writing.py [--dtype bf16] [--points 24] [--hidden 896] [--rows 16384] [--shard-rows 8192]

States that are ready are given to the writer as fast as it takes them, a microbatch of all hook points at a time, as
from a decoder. The time of `store` ends when every shard has its checksum, its statistics and its name, and all of it
is durable; that of `rows alone` when rows are durable and claimed in the journal, and nothing is sealed. All read the
same bytes of the same file in memory.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from nemo_qwen_hidden.hookpoint import RESID_POST, HookPoint
from nemo_qwen_hidden.store.entries import FileEntry, HookPointEntry, Part
from nemo_qwen_hidden.store.format import DTYPES, JOURNAL
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.table import lines_name, table_name
from nemo_qwen_hidden.store.tensors import TORCH_DTYPES
from nemo_qwen_hidden.store.write import session
from nemo_qwen_hidden.store.write.writer import ShardWriter

MEMORY = "/dev/shm"  # is not on a disk


class Run(NamedTuple):
    first_row: int
    length: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="of states, and as stored")
    parser.add_argument("--points", type=int, default=24, help="hook points")
    parser.add_argument("--hidden", type=int, default=896, help="numbers in a state")
    parser.add_argument("--rows", type=int, default=16_384, help="states of each hook point")
    parser.add_argument("--shard-rows", type=int, default=8_192, help="states in a shard")
    parser.add_argument("--batch", type=int, default=2_048, help="states of a hook point that come at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that finish shards at the end")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to write to; the temporary folder by default")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    target = target_of(asked)
    states = torch.randn(asked.batch, asked.hidden).to(TORCH_DTYPES[asked.dtype])
    size = asked.rows * asked.points * asked.hidden * states.itemsize
    shards = asked.points * target.grid.shards
    print(f"{asked.points} hook points of {asked.rows:,} x {asked.hidden} in {asked.dtype}: {size / 1e9:.2f} GB in")
    print(f"{shards} shards; {asked.threads} threads; {asked.rounds} rounds, median (lowest to highest)")
    with (
        tempfile.TemporaryDirectory(prefix="writing-", dir=asked.folder) as folder,
        tempfile.NamedTemporaryFile(dir=MEMORY) as source,
    ):
        for _ in range(size // states.nbytes):
            source.write(states.view(torch.uint8).numpy().data)
        source.flush()
        count = size // states.itemsize
        ready = torch.from_file(source.name, shared=True, size=count, dtype=states.dtype).view(-1, *states.shape)
        ways: dict[str, Callable[[Path], None]] = {
            "dd": lambda path: copy(Path(source.name), path),
            "store": lambda path: write(path, target, ready, threads=asked.threads),
            "rows alone": lambda path: write(path, target, ready, threads=0),
        }
        secs: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(asked.rounds):
            for name, way in ways.items():
                path = Path(folder, "made")
                path.mkdir()
                started, used = time.perf_counter(), cpu_secs()
                way(path)
                secs[name].append(time.perf_counter() - started)
                cpu[name].append(cpu_secs() - used)
                shutil.rmtree(path)
    report(size, secs, cpu)


def report(size: int, secs: dict[str, list[float]], cpu: dict[str, list[float]]) -> None:
    print(f"{'':12}{'GB/s':>20}{'of dd, round by round':>28}{'CPU, s/GB':>12}")
    for name, found in secs.items():
        speed = spread([size / each / 1e9 for each in found])
        ratio = spread([dd / each for dd, each in zip(secs["dd"], found, strict=True)])
        print(f"{name:12}{speed:>20}{ratio:>28}{statistics.median(cpu[name]) / size * 1e9:>12.2f}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def cpu_secs() -> float:
    """Seconds of processors that this process and those it has waited for took, in the kernel too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def copy(source: Path, folder: Path) -> None:
    command = ["dd", f"if={source}", f"of={folder / 'copy'}", "bs=4M", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)


def write(folder: Path, target: Manifest, ready: torch.Tensor, *, threads: int) -> None:
    """All states of the store, by one rank; sealed where there are ``threads``. ready: [calls, states, numbers], what
    each call gets."""
    (folder / JOURNAL).mkdir()
    states = iter(ready)
    with ShardWriter(folder, target, rank=0, sealing_threads=threads) as writer:
        for first in range(0, target.rows, ready.shape[1]):
            for point in target.points:
                writer.write(point, [Run(first, ready.shape[1])], next(states))
    if threads and session.to_seal(folder, target)[1]:
        raise SystemExit("not all shards are sealed")


def target_of(asked: argparse.Namespace) -> Manifest:
    """What is written: one part, of whose token table there is nothing but the name."""
    if asked.rows % asked.batch:
        raise SystemExit(f"--rows must be a multiple of --batch ({asked.batch}), but is {asked.rows} instead")
    nothing = {"bytes": 0, "sha256": "0" * 64}
    part = Part(
        first_row=0,
        rows=asked.rows,
        first_document=0,
        documents=1,
        shard_rows=asked.shard_rows,
        tokens=FileEntry(file=table_name(0), **nothing),
        lines=FileEntry(file=lines_name(0), **nothing),
    )
    shards = -(-asked.rows // asked.shard_rows)
    points = [HookPoint(RESID_POST, layer) for layer in range(asked.points)]
    return Manifest(
        hidden_size=asked.hidden,
        compute_dtype=asked.dtype,
        stored_dtype=DTYPES[asked.dtype].name,
        hook_points=tuple(
            HookPointEntry.of(point, num_layers=asked.points, shards=shards, shape=(asked.hidden,)) for point in points
        ),
        parts=(part,),
    )


if __name__ == "__main__":
    main()
