"""The estimate of ``plan`` beside what runs took:

    python benchmarks/scaling.py MODEL_FOLDER [--tokens 4096] [--window 512] [--repeats 3]

Calibrates this machine: an fp32 linear and an elementwise product of the model's sizes, and a write with fsync into the
folder of the stores. Runs ``extract`` with one and with all layers on one rank, and all layers on tp=2, pp=2 and dp=2,
in turn with the calibration, and prints the medians beside the estimates from the medians of the calibration. Estimated
and measured are the seconds of computing and writing and of sealing; starting and tokenizing are in neither.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from nemo_qwen_hidden.cli import runner
from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.cli.terminal import Terminal
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.parallel.machine import find_host, find_machine
from nemo_qwen_hidden.plan.cost import Machine
from nemo_qwen_hidden.plan.scaling import Corpus

MB = 1 << 20
WRITTEN_BYTES = 128 * MB
LAYOUTS = ("", "parallel.tp=2", "parallel.pp=2", "parallel.dp=2")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of the whole machine, per second: flops of products, bytes of elementwise steps, bytes to disk."""

    flops: float
    memory: float
    disk: float


def fastest(work: Callable[[], object], *, times: int = 4) -> float:
    """Seconds of the fastest of some calls."""
    work()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def calibrate(job: Job, folder: Path) -> Calibration:
    """What all cores of this machine do in the sizes of a job."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape, tokens = job.architecture.shape, job.work.tokens
    given, weight = torch.randn(tokens, shape.hidden_size), torch.randn(2 * shape.ffn_hidden_size, shape.hidden_size)
    made = torch.empty(tokens, 2 * shape.ffn_hidden_size)
    product = fastest(lambda: torch.mm(given, weight.T, out=made))
    elementwise = fastest(lambda: made.mul_(made))
    data = bytes(MB)

    def write() -> None:
        with open(folder / "written", "wb") as file:
            for _ in range(WRITTEN_BYTES // MB):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    disk = fastest(write, times=1)
    (folder / "written").unlink()
    flops = 2 * tokens * weight.numel() / product
    return Calibration(flops=flops, memory=2 * made.nbytes / elementwise, disk=WRITTEN_BYTES / disk)


def middle(calibrations: list[Calibration]) -> Calibration:
    """The median of each rate."""
    rates = {each.name: [getattr(one, each.name) for one in calibrations] for each in fields(Calibration)}
    return Calibration(**{name: statistics.median(found) for name, found in rates.items()})


def expected(job: Job, tokens: int, window: int, found: Calibration) -> float:
    """Seconds of computing, writing and sealing."""
    here = find_machine(job.settings, world=None)
    speeds = replace(here.speeds, flops=found.flops, memory=found.memory)
    machine: Machine = replace(here, speeds=speeds)
    host = replace(find_host(machine, job.topology.world), machine=found.disk, store=found.disk)
    estimate = job.estimate(Corpus(tokens=tokens, states=tokens, window=window), machine, host)
    return estimate.run_secs + estimate.after_secs


def write_corpus(path: Path, *, documents: int, length: int) -> None:
    """JSON lines of random token ids."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(documents):
            file.write(json.dumps({"token_ids": draw.choices(range(1000), k=length)}) + "\n")


def run(job: Job) -> float:
    """Seconds of computing, writing and sealing."""
    with Terminal(quiet=True) as terminal:
        done = runner.run_job(job, terminal)
    assert done is not None
    return done.run_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a Qwen2.5")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512, help="tokens of each document")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="fp32")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        common = [
            f"model.path={asked.model}",
            f"data.path={corpus}",
            f"precision={asked.precision}",
            f"store.path={folder / 'store'}",
            "store.overwrite=true",
            f"data.max_tokens={asked.window}",
            f"data.batch_tokens={asked.window}",
        ]
        write_corpus(corpus, documents=asked.tokens // asked.window, length=asked.window)
        jobs = {}
        for points, layouts in (("one", LAYOUTS[:1]), ("all", LAYOUTS)):
            for layout in layouts:
                chosen = "capture.hook_points=[resid_post@11]" if points == "one" else "capture.hook_points=[all]"
                settings = compose([*common, chosen, *([layout] if layout else [])])
                jobs[points, layout or "one rank"] = prepare(settings, world=None, for_store=True)
        first = next(iter(jobs.values()))
        taken: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
        calibrations = []
        for _ in range(asked.repeats):
            for key, job in jobs.items():
                calibrations.append(calibrate(first, folder))
                taken[key].append(run(job))
        found = middle(calibrations)
        rates = (found.flops / 1e9, found.memory / 1e9, found.disk / 1e9)
        print("{:.0f} GFLOP/s, memory {:.1f} GB/s, disk {:.2f} GB/s".format(*rates))
        print(f"{'states':>7} {'layout':>14} {'estimate, s':>12} {'measured, s':>12} {'measured / estimate':>20}")
        for key, job in jobs.items():
            estimate, measured = expected(job, asked.tokens, asked.window, found), statistics.median(taken[key])
            print(f"{key[0]:>7} {key[1]:>14} {estimate:12.2f} {measured:12.2f} {measured / estimate:20.2f}")


if __name__ == "__main__":
    main()
