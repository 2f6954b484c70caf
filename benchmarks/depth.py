"""States after every layer against the last one's alone: the same layers run, so what differs is taking and storing.

    python -m benchmarks.depth [--rounds 5] [--tokens 8192] [KEY=VALUE ...]

Settings are those of ``extract``; by default the embedded model on one rank, in fp32, stored in bf16. The time is that
of computing and writing a store, until it is durable, so the disk counts: what it takes to write as many bytes as the
store of all layers into the same folder, with fsync, is shown beside it.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks.trials import in_turn, prepared, ratios, spread, write_corpus

DEFAULTS = ("precision.stored=bf16",)
ASKED = 1.10
PIECE = bytes(8 * 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192, help="of the corpus, documents of 64 to 1000 tokens")
    parser.add_argument("--folder", help="where stores are put; the temporary folder by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of extract")
    asked = parser.parse_args()
    overrides = [*DEFAULTS, *asked.overrides]
    job = prepared([*overrides, "capture.hook_points=[all]"])
    shape = job.architecture.shape
    print(f"{shape.num_layers} layers of {job.model_folder}, {job.settings.precision.compute}, {job.topology}")
    with tempfile.TemporaryDirectory(prefix="depth-", dir=asked.folder) as folder:
        corpus = Path(folder, "corpus.jsonl")
        write_corpus(corpus, tokens=asked.tokens, vocab_size=shape.vocab_size, shortest=64)
        common = [*overrides, f"data.path={corpus}"]
        points = {"the last layer": "resid_post@-1", "every layer": "all"}
        jobs = {name: [*common, f"capture.hook_points=[{point}]"] for name, point in points.items()}
        found = in_turn(jobs, Path(folder), rounds=asked.rounds)
        itemsize = {"fp32": 4}.get(job.settings.stored_dtype, 2)
        size = asked.tokens * shape.hidden_size * shape.num_layers * itemsize
        disk = [write_secs(Path(folder, "bytes"), size) for _ in range(asked.rounds)]
    last, every = found.values()
    for name, trials in found.items():
        secs, speeds = spread([trial.secs for trial in trials], 2), spread([trial.speed for trial in trials], 0)
        print(f"{name:<16}{secs + ' s':<28}{speeds} tokens/s")
    print(f"every / last    {spread(ratios(last, every), 3):<28}{ASKED:>10.2f} is asked")
    print(f"{size / 1e6:.0f} MB with fsync: {spread(disk, 2)} s")


def write_secs(path: Path, size: int) -> float:
    """Seconds to make so many bytes durable, in one file, which goes again."""
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(-(-size // len(PIECE))):
            file.write(PIECE)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


if __name__ == "__main__":
    main()
