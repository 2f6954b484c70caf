"""What the benchmarks of jobs share: jobs over a corpus of token ids, run in turn several times."""

import json
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_qwen_hidden import extract, running
from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.errors import UserError
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks
from nemo_qwen_hidden.progress import Event
from nemo_qwen_hidden.running import Begun, RankResult


@dataclass(frozen=True)
class Trial:
    """One run of a job. secs: of computing and writing, until all is durable; the start of the ranks is not counted."""

    tokens: int
    secs: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.secs


def prepared(overrides: Sequence[str]) -> Job:
    """The job of these settings; ends the program where they cannot be."""
    try:
        return prepare(compose(list(overrides)), world=None, for_store=False)
    except UserError as error:
        raise SystemExit(str(error)) from None


def write_corpus(path: Path, *, tokens: int, vocab_size: int, shortest: int = 1, longest: int = 1000) -> None:
    """JSON lines of random token ids, documents of ``shortest`` to ``longest`` tokens, ``tokens`` in all."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while tokens > 0:
            length = min(tokens, draw.randint(shortest, longest))
            file.write(json.dumps({"token_ids": draw.choices(range(vocab_size), k=length)}) + "\n")
            tokens -= length


def in_turn(jobs: Mapping[str, Sequence[str]], folder: Path, *, rounds: int) -> dict[str, list[Trial]]:
    """Runs the job of each of these settings once a round: what else the machine does then falls on all alike. Before
    the first round each runs once, uncounted, so that files are in memory."""
    found: dict[str, list[Trial]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, overrides in jobs.items():
            trial = run(overrides, folder)
            if number:
                found[name].append(trial)
                print(f"round {number}, {name}: {trial.speed:.0f} tokens/s", file=sys.stderr)
    return found


def run(
    overrides: Sequence[str], folder: Path, *, on_event: Callable[[int, Event], None] = lambda rank, event: None
) -> Trial:
    """One run into a new store in ``folder``, which goes again. on_event: takes what each rank tells."""
    store = folder / "store"
    job = prepare(compose([*overrides, f"store.path={store}"]), world=None, for_store=True)
    with extract.locked(job):
        begun = extract.begin(job)
        results = run_ranks(started, (job, begun), world=job.topology.world, log=folder / "log", on_event=on_event)
        summary = extract.finish(job, begun, results)
    shutil.rmtree(store)
    return Trial(tokens=summary.manifest.rows, secs=summary.run_seconds)


def started(rank: Rank, job: Job, begun: Begun) -> RankResult:
    """What each rank does, as those do that the command line starts."""
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        return running.run(job, begun, groups, rank.send, rank.pulse)


def ratios(trials: Sequence[Trial], base: Sequence[Trial]) -> list[float]:
    """How fast each trial was beside the one of its round in ``base``."""
    return [trial.speed / other.speed for trial, other in zip(trials, base, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and from the least to the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
