"""Reading random rows of a store against numpy's own indexing of one flat file with the same bytes, and opening a store
of many shards:

    python benchmarks/reading.py [--rows 500000] [--hidden 896] [--shards 64] [--batch 4096]

Warm: all bytes are in memory. Cold: Linux has dropped them, and each time everything is opened and mapped anew.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_qwen_hidden import open_store
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import FileEntry, HookPointEntry, Part, ShardEntry
from nemo_qwen_hidden.store.format import DTYPES, ShardGrid, shard_name
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import shard_header
from nemo_qwen_hidden.store.statistics import ShardStatistics
from nemo_qwen_hidden.store.table import lines_name, table_name

POINT, DTYPE = HookPoint("resid_post", 12), DTYPES["bf16"]
MANY_SHARDS = 10_000
WARM, COLD = 30, 5

Read = Callable[[NDArray[np.int64]], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000, help="of the store")
    parser.add_argument("--hidden", type=int, default=896, help="values of a row, in bf16")
    parser.add_argument("--shards", type=int, default=64, help="into which the store is cut")
    parser.add_argument("--batch", type=int, default=4096, help="random rows that are read at a time")
    parser.add_argument("--folder", help="where to put twice the store's bytes; the temporary folder by default")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reading-", dir=asked.folder) as folder:
        flat, store = Path(folder, "flat"), Path(folder, "store")
        write_both(flat, store, rows=asked.rows, hidden_size=asked.hidden, shard_rows=-(-asked.rows // asked.shards))
        size = flat.stat().st_size / 1e9
        threads = f"{torch.get_num_threads()} threads of torch"
        print(f"{asked.rows:,} rows x {asked.hidden} in bf16, {size:.2f} GB, in {asked.shards} shards; {threads}")
        print(f"{asked.batch:,} random rows, ms{'memmap':>12}{'store':>9}{'memmap / store':>17}")
        report(flat, store, rows=asked.rows, hidden_size=asked.hidden, batch=asked.batch)
        many = Path(folder, "many")
        write_manifest(many, [], rows=MANY_SHARDS // 4, hidden_size=asked.hidden, shard_rows=1, points=4)
        secs = statistics.median(seconds(lambda _: open_store(many), np.zeros(0, np.int64)) for _ in range(COLD))
        print(f"opening a store of {MANY_SHARDS:,} shards: {secs:.2f} s")


def report(flat: Path, store: Path, *, rows: int, hidden_size: int, batch: int) -> None:
    rng = np.random.default_rng(0)

    def openers() -> tuple[Read, Read]:
        array = np.memmap(flat, np.int16, "r", shape=(rows, hidden_size))
        view = open_store(store)[POINT]
        return (lambda chosen: array[chosen]), (lambda chosen: view[chosen])

    array, view = openers()
    first = rng.integers(0, rows, batch)
    if not np.array_equal(array(first), view(first).view(torch.int16).numpy()):
        raise SystemExit("the store and the flat file differ")
    for read in (array, view):
        read(np.arange(rows))
    warm: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM):
        for read, found in zip((array, view), warm, strict=True):
            found.append(seconds(read, rng.integers(0, rows, batch)))
    line("warm", warm)
    del array, view, read
    cold: tuple[list[float], list[float]] = ([], [])
    for _ in range(COLD):
        for number, found in enumerate(cold):
            forget([flat, *store.rglob("*.safetensors")])
            found.append(seconds(openers()[number], rng.integers(0, rows, batch)))
    line("cold", cold)


def line(name: str, found: tuple[list[float], list[float]]) -> None:
    flat, store = (1000 * statistics.median(secs) for secs in found)
    print(f"{name:>21}{flat:>12.2f}{store:>9.2f}{flat / store:>17.2f}")


def seconds(read: Read, rows: NDArray[np.int64]) -> float:
    start = time.perf_counter()
    read(rows)
    return time.perf_counter() - start


def forget(files: Sequence[Path]) -> None:
    """Has Linux drop the bytes of files that nothing maps."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_both(flat: Path, store: Path, *, rows: int, hidden_size: int, shard_rows: int) -> None:
    """The same random bits as one flat file and as a store."""
    rng, sizes = np.random.default_rng(0), []
    (store / str(POINT)).mkdir(parents=True)
    grid = ShardGrid([(rows, shard_rows)])
    with open(flat, "wb") as file:
        for shard in range(grid.shards):
            held = grid.states_of(shard)
            start, header = header_of(held, hidden_size)
            data = rng.integers(-(2**15), 2**15, (len(held), hidden_size), dtype=np.int16).tobytes()
            file.write(data)
            with open(store / str(POINT) / shard_name(shard), "wb") as shard_file:
                shard_file.write(start + data)
                shard_file.truncate(header)  # statistics of nothing
            sizes.append(header)
    write_manifest(store, sizes, rows=rows, hidden_size=hidden_size, shard_rows=shard_rows)


def header_of(held: range, hidden_size: int) -> tuple[bytes, int]:
    """First bytes and size of a shard."""
    start, header = shard_header(
        POINT, part="0" * 64, first_row=held.start, rows=len(held), width=hidden_size, dtype=DTYPE
    )
    return start, header.size_bytes


def write_manifest(
    store: Path, sizes: Sequence[int], *, rows: int, hidden_size: int, shard_rows: int, points: int = 1
) -> None:
    """A manifest of shards of these sizes; without a token table, which this does not read."""
    grid = ShardGrid([(rows, shard_rows)])
    digest = hashlib.sha256(b"").hexdigest()
    counted = ShardStatistics(rows=0, nan=0, inf=0, max_abs=0.0, max_abs_row=0, min_norm=0.0, max_norm=0.0)
    entries = []
    for point in (HookPoint("resid_post", POINT.depth(24) - 1 + number) for number in range(points)):
        shards = (
            ShardEntry(
                file=f"{point}/{shard_name(shard)}",
                first_row=grid.starts[shard],
                rows=len(grid.states_of(shard)),
                bytes=sizes[shard] if sizes else 1,
                sha256=digest,
                statistics=counted,
            )
            for shard in range(grid.shards)
        )
        empty = HookPointEntry.of(point, num_layers=24, shards=0, shape=(hidden_size,))
        entries.append(HookPointEntry(**(vars(empty) | {"shards": tuple(shards)})))
    part = Part(
        first_row=0,
        rows=rows,
        first_document=0,
        documents=1,
        shard_rows=shard_rows,
        tokens=FileEntry(file=table_name(0), bytes=0, sha256="0" * 64),
        lines=FileEntry(file=lines_name(0), bytes=0, sha256="0" * 64),
    )
    manifest = Manifest(
        hidden_size=hidden_size,
        compute_dtype="bf16",
        stored_dtype=DTYPE.name,
        hook_points=tuple(entries),
        parts=(part,),
    )
    store.mkdir(exist_ok=True)
    (store / "manifest.json").write_bytes(manifest.to_json())


if __name__ == "__main__":
    main()
