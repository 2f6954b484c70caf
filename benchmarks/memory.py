"""Peak memory of a rank, and its time per token, over a corpus and over one ten times as large:

    python -m benchmarks.memory [--tokens 200000] [KEY=VALUE ...]

Settings are those of ``extract``; by default the embedded model on one rank, the state after its middle layer. Linux.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path

from benchmarks.trials import Trial, prepared, run, spread, write_corpus
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks
from nemo_qwen_hidden.progress import Event, Progress

DEFAULTS = ("capture.hook_points=[resid_post@2]", "precision=fp32_stored_bf16", "data.max_tokens=512")
SAMPLE_SECS = 0.02
TIMES = 10
MOST_OVER_WEIGHTS = 0.2
MOST_SLOWER = 1.03
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


def parameters(rank: Rank, job: Job) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of this rank, with all layers. Collective over all ranks."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(job.model_folder, groups=groups)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one run: peaks, tokens, seconds of computing and writing, and when, in monotonic seconds, how many tokens were
    done."""

    peaks: Peaks
    trial: Trial
    done: tuple[tuple[float, int], ...]

    def passes(self, tokens: int) -> list[float]:
        """Seconds of each further ``tokens``, but for the first, which is not marked where it begins."""
        wanted, times = tokens, []
        for time_secs, rows in self.done:
            if rows >= wanted:
                times.append(time_secs)
                wanted += tokens
        return [later - earlier for earlier, later in pairwise(times)]


def queue_bytes(rank: Rank) -> int:
    """What may wait for the disk; asked of a rank, since the starter does without the torch that the writer imports."""
    from nemo_qwen_hidden.store.write.writer import QUEUE_BYTES

    return QUEUE_BYTES


def measure(corpus: Path, overrides: Sequence[str], folder: Path) -> Measured:
    """A run of ``extract`` over this corpus, whose store goes again."""
    done: list[tuple[float, int]] = []

    def on_event(rank: int, event: Event) -> None:
        if rank == 0 and isinstance(event, Progress):
            done.append((time.monotonic(), event.rows))

    with watched() as peaks:
        trial = run([*overrides, f"data.path={corpus}"], folder, on_event=on_event)
    return Measured(peaks=peaks, trial=trial, done=tuple(done))


def report_growth(tokens: int, job: Job, overrides: Sequence[str], folder: Path) -> None:
    """A run over a corpus, one over ten times the same documents, and the first again, so that a machine that becomes
    slower meanwhile shows as a difference between the two short ones."""
    small, large = folder / "small.jsonl", folder / "large.jsonl"
    write_corpus(small, tokens=tokens, vocab_size=job.architecture.shape.vocab_size)
    with open(large, "wb") as file:
        for _ in range(TIMES):
            file.write(small.read_bytes())
    weights = max(job.rank_bytes(stage).weights for stage in range(job.topology.pp))
    (queue,) = run_ranks(queue_bytes, world=1, log=folder / "log")
    allowed = weights + MOST_OVER_WEIGHTS * weights + queue
    print(f"a rank's weights: {weights / MB:.0f} MB; with 20 % and the queue: {allowed / MB:.0f} MB")
    print(f"{'tokens':>12}{'us a token':>12}{'rank, MB':>10}{'its growth':>12}{'of that':>9}{'starter':>9}")
    found = []
    for corpus in (small, large, small):
        measured = measure(corpus, overrides, folder)
        found.append(measured)
        trial, rank, starter = measured.trial, measured.peaks.largest, measured.peaks.starter
        sizes = (f"{rank.own / MB:10.0f}", f"{rank.growth / MB:12.0f}", f"{rank.growth / allowed:9.2f}")
        print(f"{trial.tokens:12,}{1e6 / trial.speed:12.1f}{''.join(sizes)}{starter.own / MB:9.0f}", flush=True)
    first, ten, last = found
    ranks = ten.peaks.largest.own / max(each.peaks.largest.own for each in (first, last))
    starters = ten.peaks.starter.own / max(each.peaks.starter.own for each in (first, last))
    print(f"ten times as large: a rank's memory {ranks:.3f}, the starter's {starters:.3f}")
    alone = (first.trial.secs + last.trial.secs) / (first.trial.tokens + last.trial.tokens)
    times = ten.trial.secs / ten.trial.tokens / alone
    print(f"time per token {times:.3f} of the mean of the short runs, which differ by", end=" ")
    print(f"{last.trial.secs / first.trial.secs:.3f}; {MOST_SLOWER:.2f} is asked")
    passes = ten.passes(tokens // job.topology.dp)
    early, late = passes[: len(passes) // 2], passes[-(len(passes) // 2) :]
    print(f"within the long run, passes over the same documents take {spread(passes, 2)} s;", end=" ")
    print(f"the later half {statistics.median(late) / statistics.median(early):.3f} of the earlier")


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
    job = prepared(overrides)
    print(f"{job.topology}, {job.num_layers} of {job.architecture.shape.num_layers} layers of {job.model_folder}")
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        report_parameters(job, Path(folder))
        report_growth(asked.tokens, job, overrides, Path(folder))


if __name__ == "__main__":
    main()
