"""Two ranks of one thread in each layout against one rank with two, run in turn:

    python -m benchmarks.layouts [--rounds 5] [--tokens 8192] [--layers 6] [KEY=VALUE ...]

Settings are those of ``extract``; by default the embedded model in fp32, the state after its middle layer. Speeds are
those of computing and writing a store; the ratio is taken within each round, and its median over the rounds is shown.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.trials import in_turn, prepared, ratios, spread, write_corpus
from nemo_qwen_hidden.hookpoint import HookPoint

ONE = "one rank, 2 threads"
LAYOUTS = {
    ONE: ("runtime.threads=2",),
    "dp=2": ("runtime.threads=1", "parallel.dp=2"),
    "pp=2": ("runtime.threads=1", "parallel.pp=2"),
    "tp=2": ("runtime.threads=1", "parallel.tp=2"),
    "one rank, 1 thread": ("runtime.threads=1",),
}
ASKED = {"dp=2": 0.95, "pp=2": 0.90, "tp=2": 0.80}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192, help="of the corpus, documents of 64 to 1000 tokens")
    parser.add_argument("--layers", type=int, help="that are run, of the model's; half of them by default")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="so that there are microbatches to divide")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of extract")
    asked = parser.parse_args()
    job = prepared(asked.overrides)
    shape = job.architecture.shape
    layers = asked.layers or shape.num_layers // 2
    point = HookPoint("resid_post", layers - 1)
    print(f"{layers} of {shape.num_layers} layers of {job.model_folder}, {job.settings.precision.compute}")
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        corpus = Path(folder, "corpus.jsonl")
        write_corpus(corpus, tokens=asked.tokens, vocab_size=shape.vocab_size, shortest=64)
        common = (
            *(f"capture.hook_points=[{point}]", f"data.path={corpus}", f"data.batch_tokens={asked.batch_tokens}"),
            *asked.overrides,
        )
        found = in_turn({name: (*common, *own) for name, own in LAYOUTS.items()}, Path(folder), rounds=asked.rounds)
    print(f"{'':<22}{'tokens/s':<28}{'beside ' + ONE:<30}{'asked':>6}")
    for name, trials in found.items():
        speeds, beside = spread([trial.speed for trial in trials], 0), spread(ratios(trials, found[ONE]), 2)
        print(f"{name:<22}{speeds:<28}{beside:<30}{ASKED.get(name, ''):>6}")


if __name__ == "__main__":
    main()
