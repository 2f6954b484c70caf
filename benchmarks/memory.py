"""Peak memory of a rank over a corpus and over one ten times as large:

    python -m benchmarks.memory [--tokens 200000] [KEY=VALUE ...]

Settings are those of ``extract``; by default the embedded model on one rank, the state after its middle layer. Linux.
"""

import argparse
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.cli.main import main as run_program
from nemo_qwen_hidden.errors import UserError
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.parallel.launch import Rank, output_to, run_ranks

DEFAULTS = ("capture.hook_points=[resid_post@2]", "precision=fp32_stored_bf16", "data.max_tokens=512")
SAMPLE_SECS = 0.02
MB = 1e6


@dataclass
class Peak:
    """The most that one process held, in bytes. own: its anonymous pages, at any sampled moment; first: in the first
    sample, before the job began. whole: the kernel's own record (VmHWM), pages mapped from files included."""

    first: int = 0
    own: int = 0
    whole: int = 0

    @property
    def growth(self) -> int:
        """What the job added; a rank begins with NeMo imported."""
        return self.own - self.first

    def see(self, status: dict[str, int]) -> None:
        self.first = self.first or status["RssAnon"]
        self.own = max(self.own, status["RssAnon"])
        self.whole = max(self.whole, status["VmHWM"])


@dataclass
class Peaks:
    """starter: the process that starts the ranks. ranks: by process id."""

    starter: Peak = field(default_factory=Peak)
    ranks: dict[int, Peak] = field(default_factory=dict)

    @property
    def largest(self) -> Peak:
        """Of the rank that held the most of its own."""
        return max(self.ranks.values(), key=lambda peak: peak.own)


@contextmanager
def watched() -> Iterator[Peaks]:
    """While entered, samples this process and the ranks that it starts: the children of its child, the fork server."""
    peaks, stop = Peaks(), threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECS):
            if status := _status("self"):
                peaks.starter.see(status)
            for child in _children("self"):
                for rank in _children(child):
                    if status := _status(rank):
                        peaks.ranks.setdefault(int(rank), Peak()).see(status)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peaks
    finally:
        stop.set()
        sampler.join()


def _status(process: str) -> dict[str, int]:
    """RssAnon and VmHWM in bytes; empty where the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("RssAnon:", "VmHWM:")))
    found = {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}
    return found if len(found) == 2 else {}


def _children(process: str) -> list[str]:
    try:
        return " ".join(file.read_text() for file in Path(f"/proc/{process}/task").glob("*/children")).split()
    except OSError:
        return []


def write_corpus(path: Path, *, tokens: int, vocab_size: int, longest: int = 1000) -> None:
    """JSON lines of random token ids, documents of 1 to ``longest`` tokens, ``tokens`` in all."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while tokens > 0:
            length = min(tokens, draw.randint(1, longest))
            file.write(json.dumps({"token_ids": draw.choices(range(vocab_size), k=length)}) + "\n")
            tokens -= length


def parameters(rank: Rank, job: Job) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of this rank, with all layers. Collective over all ranks."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(job.model_folder, groups=groups)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def measure(tokens: int, job: Job, overrides: list[str], folder: Path) -> tuple[Peaks, float]:
    """Peaks of ``extract`` over a corpus of this size, and the seconds that it took; corpus and store go again."""
    corpus, store, log = folder / "corpus.jsonl", folder / "store", folder / "log"
    write_corpus(corpus, tokens=tokens, vocab_size=job.architecture.shape.vocab_size)
    start = time.monotonic()
    with output_to(log), watched() as peaks:
        status = run_program(["extract", "--quiet", *overrides, f"data.path={corpus}", f"store.path={store}"])
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"extract ended with {status}:\n{log.read_text()[-2000:]}")
    shutil.rmtree(store)
    return peaks, seconds


def report_growth(tokens: int, job: Job, overrides: list[str], folder: Path) -> None:
    """Two runs, and how their peaks compare."""
    print(f"{'peaks in MB':>14}{'seconds':>9}{'rank':>9}{'its growth':>12}{'with files':>12}{'starter':>9}")
    found = []
    for size in (tokens, 10 * tokens):
        peaks, seconds = measure(size, job, overrides, folder)
        found.append(peaks)
        rank, starter = peaks.largest, peaks.starter
        sizes = (f"{rank.own / MB:9.1f}", f"{rank.growth / MB:12.1f}", f"{rank.whole / MB:12.1f}")
        print(f"{size:>14,}{seconds:9.0f}{''.join(sizes)}{starter.own / MB:9.1f}")
    small, large = found
    ratios = (large.largest.own / small.largest.own, large.starter.own / small.starter.own)
    print(f"{'ratio':>14}{ratios[0]:18.3f}{ratios[1]:33.3f}")
    weights = max(job.rank_bytes(stage).weights for stage in range(job.topology.pp))
    print(f"weights of a rank: {weights / MB:.1f} MB, {weights / small.largest.growth:.0%} of its growth")


def report_parameters(job: Job, folder: Path) -> None:
    """Per rank: parameters, and those as large as the vocabulary."""
    shape = job.architecture.shape
    for rank, found in enumerate(run_ranks(parameters, (job,), world=job.topology.world, log=folder / "ranks.log")):
        stage = job.topology.at(rank).pp
        rows = shape.vocab_size // job.topology.tp
        large = [name for name, size in found.items() if size and size[0] >= rows and shape.hidden_size in size[1:]]
        total = sum(prod(size) for size in found.values())
        heads = [name for name in found if "output_layer" in name]
        print(
            f"rank {rank}, stage {stage}: {total:,} parameters in {len(found)} tensors; "
            f"vocabulary x hidden: {', '.join(large) or 'none'}; output layer: {', '.join(heads) or 'none'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="in the smaller corpus")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of extract")
    asked = parser.parse_args()
    overrides = [*DEFAULTS, *asked.overrides]
    try:
        job = prepare(compose(overrides), world=None, for_store=False)
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(f"{job.topology}, {job.num_layers} of {job.architecture.shape.num_layers} layers of {job.model_folder}")
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        report_parameters(job, Path(folder))
        report_growth(asked.tokens, job, overrides, Path(folder))


if __name__ == "__main__":
    main()
