"""The tables of docs/scaling.md, from the formula:

python benchmarks/scaling_table.py
"""

from collections.abc import Iterator

from nemo_qwen_hidden.checkpoint.published import published
from nemo_qwen_hidden.cli.plan import GPU_HOUR_USD
from nemo_qwen_hidden.cli.terminal import duration, human
from nemo_qwen_hidden.config import CaptureSettings, DataSettings, ParallelSettings, PrecisionSettings, Settings
from nemo_qwen_hidden.job import Outline, outline
from nemo_qwen_hidden.plan.hardware import GPU_HOST, gpu_machines
from nemo_qwen_hidden.plan.scaling import Corpus, Estimate
from nemo_qwen_hidden.store.format import human_bytes

MODELS = {"7B": 13, "72B": 39}  # and its middle layer
GPUS = (8, 64)
TOKENS = (10**9, 10**12)
WINDOW = 4096


def planned(model: str, gpus: int, points: str, tokens: int) -> tuple[Outline, Estimate]:
    """What ``plan`` has for a job in bf16 on the layout that it chooses."""
    settings = Settings(
        capture=CaptureSettings(hook_points=(points,)),
        data=DataSettings(max_tokens=WINDOW),
        parallel=ParallelSettings(auto=True),
        precision=PrecisionSettings(compute="bf16"),
    )
    machine = gpu_machines(gpus, itemsize=2)
    seen = outline(settings, published(model), world=gpus, machine=machine)
    return seen, seen.estimate(Corpus(tokens=tokens, states=tokens, window=WINDOW), machine, GPU_HOST)


def cases() -> Iterator[tuple[str, int, str]]:
    for model, layer in MODELS.items():
        for gpus in GPUS:
            for points in (f"resid_post@{layer}", "all"):
                yield model, gpus, points


def paces() -> Iterator[str]:
    """Speeds, which are the same for any number of tokens."""
    yield "| model | GPUs | states | layout | tokens/s | products | pp | copy | machine | store | seal | binds |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for model, gpus, points in cases():
        seen, found = planned(model, gpus, points, TOKENS[0])
        used = {use.name: f"{human(found.pace(use))}B/s" for use in found.uses if use.amount}
        used["products"] = f"{found.of('products').secs / found.run_secs:.0%}"
        names = ("products", "pp", "copy", "machine", "store", "seal")
        layout = " ".join(str(seen.topology).split()[:3])
        cells = [model, str(gpus), points, layout, human(TOKENS[0] / found.run_secs), *(used.get(n, "") for n in names)]
        yield f"| {' | '.join([*cells, found.binds.name])} |"


def totals() -> Iterator[str]:
    """What grows with the tokens."""
    yield "| model | GPUs | states | 1e9 tokens: time | store | USD | 1e12 tokens: time | store | USD |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for model, gpus, points in cases():
        cells = [model, str(gpus), points]
        for tokens in TOKENS:
            _, found = planned(model, gpus, points, tokens)
            steps = (found.before_secs, found.run_secs, found.after_secs)
            time = f"{duration(found.secs)} ({' + '.join(f'{secs / found.secs:.0%}' for secs in steps)})"
            cells += [time, human_bytes(found.stored_bytes), f"{found.rank_hours * GPU_HOUR_USD:,.0f}"]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join([*paces(), "", *totals()]))
