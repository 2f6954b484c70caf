"""How long it takes until something happens, each in a process of its own:

    python -m benchmarks.start [--rounds 3] [KEY=VALUE ...]

Settings are those of ``extract``; by default the embedded model on one rank. A rank's start is divided into its steps,
and compared with what it cannot do without: importing NeMo, and reading its own weights.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.errors import UserError
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.parallel import launch
from nemo_qwen_hidden.parallel.launch import Rank

NEMO = (
    "from megatron.core.models.gpt import GPTModel; from nemo import lightning; "
    "from nemo.collections.llm.gpt.model.qwen2 import Qwen2Model"
)
STEPS = ("settings are checked", "a fork server imports NeMo", "process groups", "the model is built", "its weights")
PHASES = ("reading weights", "tokenizing", "starting ranks", "loading weights", "running", "finishing shards")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are shown")
    parser.add_argument("--steps-of-one", type=float, metavar="START", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of extract")
    asked = parser.parse_args()
    try:
        job = prepare(compose(asked.overrides), world=None, for_store=False)
    except UserError as error:
        raise SystemExit(str(error)) from None
    if asked.steps_of_one is not None:
        print(*steps(job, started=asked.steps_of_one))
        return
    print(f"{job.topology}, {job.num_layers} of {job.architecture.shape.num_layers} layers of {job.model_folder}")
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        report(asked.overrides, asked.rounds, Path(folder))


def report(overrides: Sequence[str], rounds: int, folder: Path) -> None:
    """Every measurement once a round, in turn, so that a busy moment does not fall on one of them alone."""
    store, text = folder / "store", folder / "text.txt"
    text.write_text("A few words, so that nearly all of the time is that of the start.\n")
    into = [f"data.path={text}", f"store.path={store}"]
    timed_phases([*into, *overrides])  # files into memory, and a store to open
    commands = {
        "python -c pass": ["-c", "pass"],
        "import nemo_qwen_hidden": ["-c", "import nemo_qwen_hidden"],
        "open_store": ["-c", f"from nemo_qwen_hidden import open_store; open_store({str(store)!r})"],
        "torch, for the first states": ["-c", "import torch"],
        "--help": ["-m", "nemo_qwen_hidden", "--help"],
        "a setting that is wrong": ["-m", "nemo_qwen_hidden", "extract", "store.path=x", "parallel.tq=2"],
        "import NeMo and Megatron": ["-c", NEMO],
    }
    whole: dict[str, list[float]] = {name: [] for name in commands}
    parts: list[list[float]] = []
    phases: dict[str, list[float]] = {name: [] for name in (*PHASES, "end")}
    for _ in range(rounds):
        for name, arguments in commands.items():
            whole[name].append(secs_of(arguments))
        parts.append(timed_steps(overrides))
        for name, secs in timed_phases([*into, "store.overwrite=true", *overrides]).items():
            phases[name].append(secs)
    table("a process from its start to its end", whole)
    by_step = dict(zip(STEPS, map(list, zip(*parts, strict=True)), strict=True))
    ready = [sum(each) for each in parts]
    table("a rank until it is ready to compute, by step", {**by_step, "all": ready})
    least = statistics.median(whole["import NeMo and Megatron"]) + statistics.median(by_step["its weights"])
    print(f"importing NeMo and reading weights take {least:.2f}; all: {statistics.median(ready) / least:.2f} of that\n")
    table("extract: when each of its steps begins", {name: secs for name, secs in phases.items() if secs})


def table(title: str, rows: dict[str, list[float]]) -> None:
    print(f"{title + ', s':<48}{'median':>8}{'least':>8}{'most':>8}")
    for name, secs in rows.items():
        print(f"    {name:<44}{statistics.median(secs):8.2f}{min(secs):8.2f}{max(secs):8.2f}")
    print()


def secs_of(arguments: Sequence[str]) -> float:
    """Of a Python process, whose words are thrown away; it may say that a setting is wrong."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 2):
        raise SystemExit(done.stderr)
    return time.monotonic() - start


def timed_phases(overrides: Sequence[str]) -> dict[str, float]:
    """When each phase that ``extract`` tells of begins, in seconds from the start of its process."""
    start, found = time.monotonic(), {}
    command = [sys.executable, "-m", "nemo_qwen_hidden", "extract", *overrides]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        words = []
        for line in process.stderr:
            words.append(line)
            if line.strip() in PHASES:
                found[line.strip()] = time.monotonic() - start
    if process.returncode:
        raise SystemExit("".join(words))
    return {**found, "end": time.monotonic() - start}


def timed_steps(overrides: Sequence[str]) -> list[float]:
    """``steps`` in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.start", "--steps-of-one", str(time.monotonic()), *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [float(secs) for secs in done.stdout.split()]


def steps(job: Job, *, started: float) -> list[float]:
    """Seconds of each of ``STEPS``, of the rank that is ready last. started: when this process was, in monotonic
    seconds, which Linux counts alike for all processes."""
    checked = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        ranks = launch.run_ranks(get_ready, (job,), world=job.topology.world, log=Path(folder, "log"))
    begun, *own = max(ranks, key=sum)
    return [checked - started, begun - checked, *own]


def get_ready(rank: Rank, job: Job) -> list[float]:
    """When this rank began, in monotonic seconds, and how long it took for groups, model and weights."""
    begun = time.monotonic()
    import torch

    from nemo_qwen_hidden import running
    from nemo_qwen_hidden.model import hidden_model
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(job.settings.runtime.threads or launch.fair_threads(job.topology.world))
    read, weights = hidden_model.load_weights, []

    def load_weights(*arguments: Any) -> None:
        start = time.monotonic()
        read(*arguments)
        weights.append(time.monotonic() - start)

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        joined = time.monotonic()
        with mock.patch.object(hidden_model, "load_weights", load_weights):
            running.load_model(job, groups)
        ready = time.monotonic()
    return [begun, joined - begun, ready - joined - sum(weights), sum(weights)]


if __name__ == "__main__":
    main()
