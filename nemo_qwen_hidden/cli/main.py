"""``nemo-qwen-hidden``: arguments in, exit status out. The only place where an exception becomes a status."""

import argparse
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from nemo_qwen_hidden.cli import PROGRAM, drift
from nemo_qwen_hidden.cli.convert import add_command as add_convert
from nemo_qwen_hidden.cli.plan_options import add_options
from nemo_qwen_hidden.cli.store_commands import add_commands
from nemo_qwen_hidden.config import FinetuneSettings, Settings
from nemo_qwen_hidden.errors import FAILED, HiddenStatesError, PeerError, UserError
from nemo_qwen_hidden.version import __version__

if TYPE_CHECKING:
    from nemo_qwen_hidden.cli.known import Kind
    from nemo_qwen_hidden.doctor.report import Report
    from nemo_qwen_hidden.job import Job

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PATIENCE_SECS = 10.0
_EPILOG = """\
examples:
  nemo-qwen-hidden extract store.path=out/demo
      the embedded model over the embedded text, every layer
  nemo-qwen-hidden extract model.path=Qwen/Qwen2.5-0.5B parallel.tp=2 \\
      capture.hook_points='[resid_post@12]' data.path='texts/*.txt' \\
      store.path=out/a
      two tensor parallel ranks on this machine, one layer
  torchrun --nproc-per-node 4 -m nemo_qwen_hidden extract parallel=tp2_pp2 \\
      store.path=out/b
      as ranks that torchrun starts, on one machine or several
  nemo-qwen-hidden plan parallel=tp2_pp2
  nemo-qwen-hidden inspect out/demo
  nemo-qwen-hidden verify --full out/demo
  nemo-qwen-hidden doctor parallel.tp=2
  nemo-qwen-hidden finetune run.path=out/run train.validation_part=0.3

COMMAND --help says more. Exit status: 0 done, 1 a fault, or something wrong
that verify or doctor found, 2 something asked for cannot be done,
130 interrupted.
"""

_SETTINGS = """\
most used settings (--settings lists all, with their defaults and presets):
  model.path=FOLDER_OR_HUB_ID    a Qwen2 or Qwen2.5, of Hugging Face or NeMo 2;
                                 else the embedded one
  data.path=FILE_FOLDER_OR_GLOB  text, JSONL, Parquet; else the embedded text
  capture.hook_points='[embed,resid_post@12,resid_post@-1,final_norm]'
                                 resid_post@i is the residual stream after layer
                                 i, from 0; resid_post@0:24:6 a range; all (the
                                 default) every layer
  parallel.tp=2 parallel.pp=2 parallel.cp=2 parallel.dp=2
                                 tensor, pipeline, context, data parallel; also
                                 parallel.sp=true, parallel.vp=2; parallel=auto
  tokens=last                    which tokens are kept; also mean, assistant
  precision.compute=bf16 precision.stored=bf16
                                 fp32 (the default), bf16 or fp16; stored also
                                 int8, with a scale for each row
  data.max_tokens=2048           longer documents are run in windows
"""

_EXTRACT = (
    _SETTINGS
    + """\
  store.path=FOLDER              for the hidden states: a new or empty folder,
                                 or a store of this job to go on with
  store.overwrite=true           replace an earlier store there
  store.add=hook_points          to a finished store, over its own rows:
                                 data.path is not read
  store.add=documents            to a finished store, at its end
  profile.trace=FILE             what each rank does when, for ui.perfetto.dev

After Ctrl-C or a crash the same command goes on, in any layout, and runs only
what is missing. Without torchrun, the ranks asked for are started on this
machine. Libraries' messages go to FOLDER.log.

examples:
  nemo-qwen-hidden extract store.path=out/demo
  nemo-qwen-hidden extract parallel=tp2_pp2 capture=last data.path=texts \\
      store.path=out/last
  nemo-qwen-hidden extract --config recipes/one_machine/config.yaml
"""
)

_DOCTOR = (
    _SETTINGS
    + """
Runs a few documents twice, at every site of every layer, and checks that the
sums of the residual stream hold, that two runs and all replicas agree bit by
bit, and that every state is that of transformers. Where something differs it
says what is wrong, with the first layer, site and token. docs/doctor.md lists
what it knows. Settings of capture, tokens, store and profile are not used.

With --against it looks at a store instead, or at states of another program: a
safetensors file or a folder of .npy with token_ids, and states by hook point or
as hidden_states.

examples:
  nemo-qwen-hidden doctor model.path=Qwen/Qwen2.5-0.5B parallel.tp=2
  nemo-qwen-hidden doctor --against out/demo
  nemo-qwen-hidden doctor --against dump.safetensors model.path=my_model

Exit status: 0 healthy, 1 something is wrong, 2 it cannot be looked at.
"""
)

_PLAN = (
    _SETTINGS
    + """
Takes what extract takes, reads and tokenizes the data, and says how many rows,
shards and bytes a new store would have, what each rank would hold, how long it
would take, what goes over each link, which of them binds, and what it costs.
Loads no weights, writes nothing, and does not look at what is at store.path.

--gpus, --tokens and --shape stand for a machine, data and a model that are not
here. Times are estimates: docs/scaling.md has the formula and what it misses.

examples:
  nemo-qwen-hidden plan model.path=Qwen/Qwen2.5-7B parallel.tp=4 data.path=texts
  nemo-qwen-hidden plan --shape 72B --gpus 64 --tokens 1e12 parallel=auto \\
      precision=bf16 capture.hook_points='[resid_post@40]' data.max_tokens=4096
"""
)

_FINETUNE = """\
most used settings (--settings lists all, with their defaults and presets):
  run.path=FOLDER                for checkpoints, TensorBoard's events and logs:
                                 new, or a run to go on with
  model.path=FOLDER_OR_HUB_ID    a Qwen2 or Qwen2.5; else the embedded one
  data.path=FILE_FOLDER_OR_GLOB  text, JSONL, Parquet; else the embedded text
  train.max_steps=200 train.lr=1e-4 train.seq_length=512
  train.global_batch_size=16 train.micro_batch_size=2
  train.lora_dim=16              a LoRA of this dimension; else all weights
  train.recompute=uniform        none (the default), selective, uniform, block
  parallel.tp=2 parallel.pp=2 parallel.cp=2 parallel.dp=2
                                 also parallel.sp=true, parallel.vp=2
  precision.compute=bf16         fp32 is the default
  watch.store=FOLDER capture.hook_points='[resid_post@3]' watch.every=10
                                 hidden states of every tenth step into a store

Trains with NeMo's own trainer, strategy, optimizer and checkpoints. After
Ctrl-C or a crash the same command goes on from the last checkpoint, in any
layout. Without torchrun, the ranks asked for are started on this machine, which
then must have no GPU. Libraries' messages go to FOLDER.log.

--plan checks the same, reads the data, and says what each rank would hold,
which steps would be captured, and what would be written. It writes nothing.

examples:
  nemo-qwen-hidden finetune --plan run.path=out/run train.validation_part=0.3
  nemo-qwen-hidden finetune run.path=out/run train.validation_part=0.3 \\
      parallel.tp=2
  torchrun --nproc-per-node 4 -m nemo_qwen_hidden finetune parallel=tp2_pp2 \\
      model.path=Qwen/Qwen2.5-0.5B data.path=texts run.path=out/run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 a fault, 2 the user's mistake, 130 interrupted."""
    parsed = _parse(arguments)
    try:
        return int(parsed.run(parsed))
    except UserError as error:
        return _say(error, 2)
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt)
    except PeerError as error:
        return error.status
    except HiddenStatesError as error:
        return _say(error, 1)


def _say(error: BaseException | str, status: int) -> int:
    """One line for each problem, then what is to be said after it."""
    for text in (str(error), *getattr(error, "__notes__", ())):
        for line in text.splitlines():
            print(f"{PROGRAM}: {line}", file=sys.stderr)
    return status


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    """Ctrl-C reaches every rank of torchrun's; one says so."""
    from nemo_qwen_hidden.parallel.launch import is_first_rank

    return _say(": ".join(("interrupted", *map(str, interrupt.args))), 130) if is_first_rank() else 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes overrides in one run alone; those after an option, as in ``a=1 --quiet b=2``, come back."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    strange = [text for text in rest if text.startswith("-") or "overrides" not in parsed]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Hidden states of Qwen2 and Qwen2.5 models in NeMo, on any parallel layout.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    extract = _command(commands, "extract", "run documents through a model and store hidden states", _EXTRACT)
    plan = _command(commands, "plan", "say what extract would do, without loading weights", _PLAN)
    doctor = _command(commands, "doctor", "check hidden states, and say what is wrong with them", _DOCTOR)
    finetune = _command(commands, "finetune", "fine-tune a model with NeMo, and watch its hidden states", _FINETUNE)
    for command, run in ((extract, _extract), (plan, _plan), (doctor, _doctor), (finetune, _finetune)):
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, or presets as GROUP=NAME")
        command.add_argument("--config", metavar="FILE", help="a YAML file of settings, such as a recipe's")
        kind = FinetuneSettings if command is finetune else Settings
        listed = "list every setting and preset, and exit"
        command.add_argument("--settings", action=_ShowSettings, kind=kind, help=listed)
        command.set_defaults(run=run)
    add_options(plan)
    for command in (extract, doctor, finetune):
        command.add_argument("--quiet", action="store_true", help="no progress, only the result")
    finetune.add_argument("--plan", action="store_true", help="say what the run would do and take, and do nothing")
    doctor.add_argument("--against", metavar="STORE", help="look at a store, or at a file of states, not at a model")
    doctor.add_argument("--documents", type=_at_least_one, default=8, metavar="N", help="look at N documents (8)")
    doctor.add_argument("--tokens", type=_at_least_one, default=128, metavar="N", help="and the first N tokens (128)")
    doctor.add_argument("--json", action="store_true", help="the report for programs: JSON on stdout")
    add_convert(partial(_command, commands))
    add_commands(partial(_command, commands))
    drift.add_command(partial(_command, commands))
    return parser


def _command(commands: "Commands", name: str, help_text: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r} instead")
    return int(text)


class _ShowSettings(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, kind: "Kind", help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._kind = kind

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from nemo_qwen_hidden.cli.settings_table import presets_table, settings_table

        for row in settings_table(self._kind):
            print(f"{row.key} = {row.default}\n{_wrapped(row.help)}")
        print("\npresets")
        for group, names in presets_table(self._kind).items():
            print(_wrapped(f"{group}={' '.join(names)}"))
        parser.exit(0)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def _prepared(
    parsed: argparse.Namespace, *, for_store: bool, change: "Callable[[Settings], Settings] | None" = None
) -> "Job":
    """The job, checked."""
    from nemo_qwen_hidden.cli.compose import compose
    from nemo_qwen_hidden.job import prepare
    from nemo_qwen_hidden.parallel.launch import launched_world

    with _one_of_a_machine_says():
        settings = compose(parsed.overrides, config=parsed.config)
        settings = change(settings) if change is not None else settings
        return prepare(settings, world=launched_world(), for_store=for_store)


@contextmanager
def _one_of_a_machine_says() -> Iterator[None]:
    """Every rank that torchrun started finds the same fault inside, and one of a machine says it.

    The others wait: torchrun ends them as soon as that one ends, and ends that one, said or not, as soon as they do.
    """
    from nemo_qwen_hidden.parallel.launch import is_first_of_machine

    try:
        yield
    except UserError:
        if not is_first_of_machine():
            time.sleep(PATIENCE_SECS)
        raise


def _extract(parsed: argparse.Namespace) -> int:
    job = _prepared(parsed, for_store=True)
    from nemo_qwen_hidden.cli import runner, show
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.parallel.launch import is_first_rank

    with Terminal(quiet=parsed.quiet or not is_first_rank()) as terminal:
        show.choice(job, terminal)
        summary = runner.run_job(job, terminal)
        if summary is not None:
            show.summary(summary, terminal)
            show.trace(job, summary, terminal)
    return 0


def _finetune(parsed: argparse.Namespace) -> int:
    if parsed.plan:
        return _plan_finetuning(parsed)
    from nemo_qwen_hidden import finetuning
    from nemo_qwen_hidden.cli import finetune
    from nemo_qwen_hidden.cli.compose import compose_finetuning
    from nemo_qwen_hidden.parallel.launch import launched_world
    from nemo_qwen_hidden.training.outlook import outline

    with _one_of_a_machine_says():
        settings = compose_finetuning(parsed.overrides, config=parsed.config)
        job = finetuning.prepare(settings, world=launched_world())
        seen = outline(job)
        seen.check_disks()
        finetuning.make_folder(job)
    return finetune.run(parsed, seen)


def _plan_finetuning(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli import finetune_plan
    from nemo_qwen_hidden.cli.compose import compose_finetuning
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.parallel.launch import is_first_rank, launched_world
    from nemo_qwen_hidden.training.job import prepare

    with _one_of_a_machine_says():
        settings = compose_finetuning(parsed.overrides, config=parsed.config)
        job = prepare(settings, world=launched_world())
        if is_first_rank():
            with Terminal(quiet=parsed.quiet) as terminal:
                finetune_plan.run(job, terminal)
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli import plan
    from nemo_qwen_hidden.cli.terminal import Terminal

    with Terminal() as terminal, _one_of_a_machine_says():
        plan.show(plan.planned(parsed, terminal), terminal)
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli import doctor
    from nemo_qwen_hidden.cli.compose import compose
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.doctor.visit import everywhere
    from nemo_qwen_hidden.parallel.launch import is_first_rank
    from nemo_qwen_hidden.store.fields import to_json

    looked_at = {"documents": parsed.documents, "tokens": parsed.tokens}
    with Terminal(quiet=parsed.quiet or parsed.json or not is_first_rank()) as terminal:
        if parsed.against is not None:
            settings = compose(parsed.overrides, config=parsed.config)
            report: Report | None = doctor.at_a_store(parsed.against, settings, **looked_at)
            healthy = report is not None and report.healthy
        else:
            job = _prepared(parsed, for_store=False, change=everywhere)
            report, healthy = doctor.at_a_live_model(job, terminal, **looked_at)
        if report is not None and parsed.json:
            print(to_json(report.as_dict()).decode(), end="")
        elif report is not None:
            doctor.show(report, terminal)
    return 0 if healthy else FAILED
