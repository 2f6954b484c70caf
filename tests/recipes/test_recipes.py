"""Recipes: each configuration and command can be run as it stands, and all give the same store."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from subprocess import Popen

import pytest
import torch

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.config import check
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.job import prepare
from nemo_qwen_hidden.store.read.reader import open_store
from tests.conftest import Start
from tests.recipes import commands
from tests.recipes.commands import RECIPES, ROOT
from tests.support.models import Batch, relative_error, transformers_states

NAMES = ("gather_rank0", "one_process", "one_machine", "several_machines", "slurm")
EVERYTHING = "capture.hook_points=[embed,all,final_norm]"
BOUND = 5e-6
BF16_BOUND = 2**-8
TEXTS = ("import os\n", "def area(radius):\n    return radius ** 2\n", "x", "A class. " * 40, "a, b = b, a\n" * 9)


def test_recipes_are_listed_in_order() -> None:
    linked = re.findall(r"\]\((\w+)/README\.md\)", (RECIPES / "README.md").read_text())
    assert linked[: len(NAMES) + 2] == [*NAMES, "finetune_capture", "steering"]
    assert set(linked) == {folder.parent.name for folder in RECIPES.glob("*/README.md")}


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_is_short_and_composes(recipe: str) -> None:
    assert len((RECIPES / recipe / "README.md").read_text().splitlines()) <= 25
    check(compose([], config=str(RECIPES / recipe / "config.yaml")))


@pytest.mark.parametrize("recipe", [name for name in NAMES if name != "slurm"])
def test_commands_of_a_readme_fit_their_ranks_and_the_embedded_model(recipe: str) -> None:
    shown = commands.of(recipe)
    assert shown
    for command in shown:
        assert command.config == str(RECIPES / recipe / "config.yaml")
        settings = compose(command.overrides, config=command.config)
        assert settings.store.path == f"out/{'gathered' if recipe == 'gather_rank0' else recipe}"
        job = prepare(settings, world=command.world, for_store=False)
        assert command.world in (None, job.topology.world)


class Runs:
    """torchrun processes that work side by side, each with its store and its log."""

    def __init__(self, folder: Path, data: str, stack: ExitStack) -> None:
        self.folder, self.data = folder, data
        self._stack, self._deadline = stack, time.monotonic() + commands.TIMEOUT_SECS
        self._processes: dict[str, list[tuple[Popen[bytes], Path]]] = {}

    def start(self, store: str, options: list[str], command: commands.Command, *overrides: str) -> None:
        """Starts ``command`` under torchrun with ``options``; several may make one store."""
        processes = self._processes.setdefault(store, [])
        log = self.folder / f"{store}.{len(processes)}.torchrun.log"
        arguments = command.to(self.folder / store, self.data, *overrides)
        processes.append((self._stack.enter_context(commands.torchrun(options, arguments, log=log)), log))

    def store(self, name: str) -> Path:
        """The store of that name, when every process that makes it has ended well."""
        for process, log in self._processes[name]:
            commands.finish(process, log, self._deadline)
        return self.folder / name

    def here(self, store: str, command: commands.Command, *overrides: str) -> Path:
        """Makes a store without a launcher."""
        assert main(command.to(self.folder / store, self.data, *overrides)) == 0
        return self.folder / store


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The two runs under torchrun, started: each of their ranks spends most of its time importing NeMo."""
    folder = tmp_path_factory.mktemp("recipes")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with ExitStack() as stack:
        started = Runs(folder, f"data.path={data}", stack)
        (headline,) = commands.of("gather_rank0")
        started.start("gathered", list(headline.launcher[1:]), headline)
        endpoint = f"127.0.0.1:{commands.free_port()}"
        for command in commands.of("several_machines"):
            options = [endpoint if word == "host0:29500" else word for word in command.launcher[1:]]
            options[options.index("--nproc-per-node") + 1] = "1"
            started.start("agents", options, command, "parallel.tp=1")
        yield started


@pytest.fixture(scope="module")
def one_process(runs: Runs) -> Path:
    (command,) = commands.of("one_process")
    return runs.here("one_process", command, EVERYTHING)


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store but the manifest, which tells how and when it was made."""
    found = {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}
    del found["manifest.json"]
    return found


def tokens(store: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(store).items() if name.startswith("tokens/")}


def test_ranks_that_the_program_starts_store_the_rows_of_one_process(runs: Runs, one_process: Path) -> None:
    (command,) = commands.of("one_machine")
    store = runs.here("one_machine", command)
    assert tokens(store) == tokens(one_process)
    whole, rounded = open_store(one_process), open_store(store)
    assert rounded.dtype == torch.bfloat16 and len(rounded.hook_points) == 6
    for point in rounded.hook_points:
        assert relative_error(rounded[point][:], whole[point][:]) <= BF16_BOUND


def test_the_script_holds_in_memory_what_transformers_computes(start_ranks: Start) -> None:
    from transformers import AutoTokenizer

    script = RECIPES / "gather_rank0" / "in_memory.py"
    (shown,) = (c for c in commands.shown_in(RECIPES / "gather_rank0" / "README.md") if not c.extracts)
    assert (shown.words[0], shown.words[-1]) == ("torchrun", str(script.relative_to(ROOT)))
    ranks = start_ranks(4, commands.as_under_torchrun, str(script), commands.free_port(), "states")
    assert ranks[1:] == [("", {})] * 3
    printed, states = ranks[0]
    assert [line.partition(":")[0] for line in printed.splitlines()] == list(states)
    texts = re.findall(r'"(.*?)"', re.search(r"^TEXTS = \[(.*)\]$", script.read_text(), re.M)[1])  # type: ignore[index]
    encoded = AutoTokenizer.from_pretrained(demo.model_folder())(texts, padding=True, return_tensors="pt")
    lengths = tuple(encoded.attention_mask.sum(dim=1).tolist())
    reference = transformers_states(demo.model_folder(), Batch(encoded.input_ids, lengths))
    for name, values in states.items():
        for row, length in enumerate(lengths):
            expected = reference[row][HookPoint.parse(name)]
            assert relative_error(torch.from_numpy(values[row, :length]), expected) <= BOUND


def test_steering_says_what_the_same_vector_in_transformers_makes_it_say(start_ranks: Start) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script, readme = RECIPES / "steering" / "steer.py", RECIPES / "steering" / "README.md"
    (shown,) = commands.shown_in(readme)
    assert (shown.words[0], shown.words[-1]) == ("torchrun", str(script.relative_to(ROOT)))
    assert len(readme.read_text().splitlines()) <= 25
    (printed, new), (silent, _) = start_ranks(2, commands.as_under_torchrun, str(script), commands.free_port(), "new")
    assert not silent and [line.partition(":")[0] for line in printed.splitlines()] == [
        "norm of the vector",
        "plain",
        "steered",
    ]

    chosen = dict(re.findall(r"^([A-Z]+) = (\".*\")$", script.read_text(), re.M))
    towards, away, prompt = (ast.literal_eval(chosen[name]) for name in ("TOWARDS", "FROM", "PROMPT"))
    tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
    model = AutoModelForCausalLM.from_pretrained(demo.model_folder(), dtype=torch.float32).eval()

    def encoded(text: str) -> torch.Tensor:
        return tokenizer([text], return_tensors="pt").input_ids

    @torch.no_grad()
    def mean_after_layer_1(text: str) -> torch.Tensor:
        return model(encoded(text), output_hidden_states=True).hidden_states[2][0].mean(dim=0)

    @torch.no_grad()
    def next_tokens(count: int) -> list[int]:
        ids = encoded(prompt)
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
        return ids[0, -count:].tolist()

    vector = mean_after_layer_1(towards) - mean_after_layer_1(away)
    assert f"{vector.norm():.4f}" in printed
    assert new["plain"] == next_tokens(len(new["plain"]))
    model.model.layers[1].register_forward_hook(lambda _module, _inputs, output: output + vector)
    assert new["steered"] == next_tokens(len(new["steered"])) != new["plain"]


def slurm_calls(folder: Path, *arguments: str) -> list[list[str]]:
    """What ``job.sbatch`` hands to torchrun on each of two nodes, with stand-ins for Slurm and torchrun."""
    stand_ins = {
        "scontrol": '[ "$*" = "show hostnames nodes[1-2]" ] && printf "%s\\n" node1 node2',
        "srun": 'while [[ $1 == --* ]]; do shift; done; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "torchrun": 'printf "%s\\0" "$@" > "$CALLS/$SLURM_NODEID"',
    }
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12345", "CALLS": str(folder)}
    environment = {**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}"}
    script = ["bash", str(RECIPES / "slurm" / "job.sbatch"), *arguments]
    subprocess.run(script, cwd=ROOT, env=environment, check=True, timeout=30)
    return [(folder / node).read_text().split("\0")[:-1] for node in ("0", "1")]


def test_slurm_starts_the_torchrun_of_several_machines(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(RECIPES / "slurm" / "job.sbatch")], check=True, timeout=30)
    calls = slurm_calls(tmp_path, "store.path=out/of one", "data.max_tokens=64")
    instead = {
        "host0:29500": "node1:22345",
        "recipes/several_machines/config.yaml": "recipes/slurm/config.yaml",
        "store.path=out/several_machines": "store.path=out/of one",
    }
    by_hand = [[instead.get(word, word) for word in shown.words[1:]] for shown in commands.of("several_machines")]
    assert calls == [[*words, "data.max_tokens=64"] for words in by_hand]
    settings = compose(calls[0][calls[0].index("--config") + 2 :], config=str(RECIPES / "slurm" / "config.yaml"))
    assert str(prepare(settings, world=4, for_store=False).topology) == "tp=2 pp=1 dp=2 sp=false"


def test_nemo_run_would_submit_the_same(tmp_path: Path) -> None:
    (shown,) = (c for c in commands.shown_in(RECIPES / "slurm" / "README.md") if c.words[0] == "python")
    environment = {**os.environ, "NEMORUN_HOME": str(tmp_path), "COLUMNS": "1000"}
    asked = [sys.executable, *shown.words[1:], "--dry-run", "--job-dir", str(tmp_path)]
    ran = subprocess.run(asked, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=120)
    line = next(line for line in ran.stdout.splitlines() if line.strip().startswith("srun"))
    words = line[line.index("torchrun") :].split()
    options = dict(pairwise(words))
    assert (options["--nnodes"], options["--nproc-per-node"], options["--node-rank"]) == ("2", "2", "$SLURM_NODEID")
    extract = ["-m", "nemo_qwen_hidden", "extract", "--config", str(RECIPES / "slurm" / "config.yaml")]
    assert words[words.index("-m") :] == [*extract, "store.path=/shared/out/slurm"]


def test_two_agents_write_the_bytes_that_the_program_writes_alone(runs: Runs) -> None:
    command = commands.of("several_machines")[0]
    alone = runs.here("alone", command, "parallel.tp=1")
    assert files(runs.store("agents")) == files(alone)
    assert open_store(alone).manifest.producers[0]["layout"]["pp"] == 2


def test_gathered_on_rank_0_is_the_store_of_one_process(runs: Runs, one_process: Path) -> None:
    gathered, alone = open_store(runs.store("gathered")), open_store(one_process)
    assert tokens(gathered.path) == tokens(alone.path)
    assert gathered.hook_points == alone.hook_points and len(alone.hook_points) == 8
    for point in alone.hook_points:
        assert relative_error(gathered[point][:], alone[point][:]) <= BOUND
