"""Hidden states to disk: this package's ``extract`` against the ways that there are today, and against the floor of the
matrix products alone:

    python -m benchmarks.extraction --model FOLDER --dtype bf16 [--tokens 12000] [--equal 512] [--json OUT] [--plot OUT]
        [KEY=VALUE ...]

All do the same work in one run, in turn, several times. Each is a process of its own that has loaded its model before;
one computes at a time, on all cores. Settings are those of ``extract``, for our side alone. Before anything is timed,
each does every case for every fourth document, and its states are compared with ours in fp32; those of the timed rounds
are compared, too. ``benchmarks/README.md`` says what is counted.
"""

import argparse
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks import corpus, report
from benchmarks.report import ASKED_OF_SCRIPT, CaseResult, Result
from benchmarks.work import BF16, FP32, Case, Choices, Errors, Work, cases
from benchmarks.worker import CLASSES, FLOOR, OURS, ContestantError, Worker
from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.parallel.launch import fair_threads

PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight", "megatron-core", "nemo-toolkit")
CHECKED_BEFORE = 4
"""Of how many documents one is run, and compared, before anything is timed."""


def main() -> None:
    asked = _parser().parse_args()
    model = asked.model.absolute()
    if asked.equal:
        documents = corpus.equal(model, tokens=asked.tokens, length=asked.equal)
    else:
        documents = corpus.ragged(model, tokens=asked.tokens, longest=asked.longest)
    work = Work(model=model, dtype=asked.dtype, documents=documents, settings=tuple(asked.settings))
    known = cases(read_architecture(model).shape.num_layers)
    with tempfile.TemporaryDirectory(prefix="extraction-", dir=asked.folder) as folder:
        match = Match(work, asked.contestants, Path(folder))
        try:
            played = match.play([known[name] for name in asked.cases], asked.rounds)
        except ContestantError as error:
            raise SystemExit(str(error)) from None
    result = Result(
        dtype=asked.dtype,
        lengths=[len(ids) for ids in documents],
        equal=asked.equal is not None,
        cases=played,
        choices={who: made for who, made in match.choices.items() if made},
        machine=_machine(),
        versions={name: version(name) for name in PACKAGES},
        command=shlex.join(["python", "-m", "benchmarks.extraction", *sys.argv[1:]]),
    )
    print(report.tables(result))
    if asked.json:
        result.write(asked.json)
    if asked.plot:
        report.plot([result], asked.plot)


class Match:
    """Contestants that do the same work in turn."""

    def __init__(self, work: Work, names: Sequence[str], folder: Path) -> None:
        self.work, self.folder = work, folder
        self.works = {name: work for name in CLASSES if name in names and name != FLOOR}
        if FLOOR in names:
            # where a machine multiplies bf16 slower than fp32, the floor in bf16 is no limit to what can be reached
            self.works |= {f"{FLOOR} in {dtype}": work.of_dtype(dtype) for dtype in dict.fromkeys((work.dtype, FP32))}
        self.choices: dict[str, Choices] = {}

    def play(self, played: Sequence[Case], rounds: int) -> list[CaseResult]:
        """Every contestant does every case, in every round."""
        results = [
            CaseResult(name=each.name, title=each.title, layers=each.layers, seconds={who: [] for who in self.works})
            for each in played
        ]
        everything = range(len(self.work.documents))
        with ExitStack() as stack:
            _say("loading models")
            workers = {
                who: stack.enter_context(Worker(who, who.partition(" ")[0], work, self.folder))
                for who, work in self.works.items()
            }
            reference = self._reference(workers)
            for worker in workers.values():
                worker.wait()
            for who, worker in workers.items():
                _say(f"{who}: choosing settings")
                self.choices[who] = worker.choose()
            for case in played:
                for who, worker in workers.items():
                    _say(f"{case.title}: comparing the states of {who} with ours in fp32")
                    _run(worker, case, everything[::CHECKED_BEFORE], reference)
            for number in range(rounds):
                for case, result in zip(played, results, strict=True):
                    for who, worker in workers.items():
                        seconds, errors = _run(worker, case, everything, reference)
                        result.seconds[who].append(seconds)
                        if errors is not None:
                            result.errors[who] = errors
                        _say(f"round {number + 1} of {rounds}, {case.title}, {who}: {seconds:.2f} s")
        return results

    def _reference(self, workers: Mapping[str, Worker]) -> Path:
        """Our states of all documents at all hook points, in fp32 and with default settings."""
        _say("states of ours in fp32, to compare with")
        work = replace(self.work, dtype=FP32, settings=())
        worker = workers[OURS] if self.works.get(OURS) == work else Worker("reference", OURS, work, self.folder)
        everything = cases(read_architecture(work.model).shape.num_layers)["all"]
        with nullcontext(worker) if worker in workers.values() else worker:
            _, path = worker.run(everything, range(len(work.documents)))
        return path / "store"


def _run(worker: Worker, case: Case, documents: Sequence[int], reference: Path) -> tuple[float, Errors | None]:
    """Seconds, and how far the states are from the reference; None of a floor, which has none. Nothing stays."""
    seconds, folder = worker.run(case, documents)
    if not folder.exists():
        return seconds, None
    errors = worker.check(case, documents, folder, reference)
    shutil.rmtree(folder)
    return seconds, errors


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _machine() -> str:
    """The processor's name, cores, and what it has for products in bf16."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in fields["flags"].split()]
    return f"{fair_threads(1)} cores of {fields['model name']} ({units[0] if units else platform.machine()})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of extract")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder of a Qwen2 model")
    parser.add_argument("--dtype", choices=(BF16, FP32), required=True, help="of weights, activations and files")
    parser.add_argument("--tokens", type=int, default=12_000, help="of the corpus, about (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a document (default: %(default)s)")
    parser.add_argument("--equal", type=int, metavar="TOKENS", help="make all documents as long as this")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--cases", nargs="+", choices=tuple(ASKED_OF_SCRIPT), default=list(ASKED_OF_SCRIPT))
    parser.add_argument("--contestants", nargs="+", choices=tuple(CLASSES), default=list(CLASSES))
    parser.add_argument("--folder", type=Path, help="where all write to (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="to write the result to, for benchmarks.report")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="to draw the result in, .png or .svg")
    return parser


if __name__ == "__main__":
    main()
