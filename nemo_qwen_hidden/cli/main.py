"""``nemo-qwen-hidden``: arguments in, exit status out. The only place where an exception becomes a status."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_qwen_hidden import __version__
from nemo_qwen_hidden.errors import HiddenStatesError, PeerError, UserError

if TYPE_CHECKING:
    from nemo_qwen_hidden.job import Job

_EPILOG = """\
examples:
  nemo-qwen-hidden extract store.path=out/demo
  nemo-qwen-hidden extract model.path=Qwen/Qwen2.5-0.5B parallel.tp=2 \\
      capture.hook_points='[resid_post@12]' data.path='texts/*.txt' store.path=out/a
  nemo-qwen-hidden plan parallel=tp2_pp2
  nemo-qwen-hidden inspect out/demo
  torchrun --nproc-per-node 4 -m nemo_qwen_hidden extract parallel=tp2_pp2 store.path=out/b

exit status: 0 done, 1 a fault, 2 something asked for cannot be done, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 a fault, 2 the user's mistake, 130 interrupted."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except UserError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("interrupted; an unfinished store can be started again with store.overwrite=true", 130)
    except PeerError as error:
        return error.status
    except HiddenStatesError as error:
        return _say(str(error), 1)


def _say(message: str, status: int) -> int:
    """One line for each problem."""
    for line in message.splitlines():
        print(f"nemo-qwen-hidden: {line}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-qwen-hidden",
        description="Hidden states of Qwen2 and Qwen2.5 models in NeMo, on any parallel layout.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, help_text in (
        ("extract", _extract, "run documents through a model and store hidden states"),
        ("plan", _plan, "say what extract would do, without loading weights"),
    ):
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, or presets as group=name")
        command.add_argument("--config", metavar="FILE", help="a YAML file of settings, such as a recipe's")
        command.add_argument("--settings", action=_ShowSettings, help="list every setting and preset, and exit")
        if name == "extract":
            command.add_argument("--quiet", action="store_true", help="no progress, only the result")
        command.set_defaults(run=run)
    inspect = commands.add_parser("inspect", help="say what is in a store")
    inspect.add_argument("store", metavar="STORE", help="the folder of a store")
    inspect.add_argument("--json", action="store_true", help="for programs: JSON on stdout")
    inspect.set_defaults(run=_inspect)
    return parser


class _ShowSettings(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from nemo_qwen_hidden.cli.settings_table import presets_table, settings_table

        for row in settings_table():
            print(f"{row.key} = {row.default}\n    {row.help}")
        print("\npresets")
        for group, names in presets_table().items():
            print(f"    {group}={'|'.join(names)}")
        parser.exit(0)


def _prepared(parsed: argparse.Namespace, *, for_store: bool) -> "Job":
    """The job, checked. Every rank that torchrun started finds the same fault here; one of a machine says it."""
    from nemo_qwen_hidden.cli.compose import compose
    from nemo_qwen_hidden.job import prepare
    from nemo_qwen_hidden.parallel.launch import launched_world

    try:
        settings = compose(parsed.overrides, config=parsed.config)
        return prepare(settings, world=launched_world(), for_store=for_store)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) != 0:
            raise PeerError(2) from error
        raise


def _extract(parsed: argparse.Namespace) -> int:
    job = _prepared(parsed, for_store=True)
    from nemo_qwen_hidden.cli import runner, show
    from nemo_qwen_hidden.cli.terminal import Terminal

    rank_0 = int(os.environ.get("RANK", 0)) == 0
    terminal = Terminal(quiet=parsed.quiet or not rank_0)
    summary = runner.run_job(job, terminal)
    if summary is not None:
        show.summary(summary, terminal)
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    job = _prepared(parsed, for_store=False)
    from nemo_qwen_hidden.cli import show
    from nemo_qwen_hidden.cli.terminal import Terminal

    show.plan(job, Terminal())
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    import json

    from nemo_qwen_hidden.cli import show
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.store.describe import as_dict
    from nemo_qwen_hidden.store.reader import open_store

    store = open_store(parsed.store)
    if parsed.json:
        print(json.dumps(as_dict(store), indent=2))
    else:
        show.store(store, Terminal())
    return 0
