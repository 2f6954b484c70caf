"""``nemo-qwen-hidden convert``: a Hugging Face folder into a NeMo checkpoint, or back."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

Add = Callable[[str, str, str], argparse.ArgumentParser]

_CONVERT = """\
SOURCE is a Hugging Face folder or hub id, which NeMo's own importer makes into
a NeMo 2 checkpoint, or a NeMo 2 checkpoint written in any layout, which becomes
a Hugging Face folder. Only Qwen2 and Qwen2.5. TARGET appears when all of it is
there and its weights were compared with those of SOURCE, bit by bit.
With --adapter a LoRA of NeMo's PEFT is merged into them: added in fp32, and
rounded once. docs/checkpoints.md says what is read of a NeMo checkpoint.

examples:
  nemo-qwen-hidden convert Qwen/Qwen2.5-0.5B out/qwen-nemo
  nemo-qwen-hidden convert out/finetuned out/finetuned-hf
  nemo-qwen-hidden convert out/qwen-nemo out/tuned-hf --adapter out/lora
"""


def add_command(add: Add) -> None:
    """Adds the command to the program's."""
    command = add("convert", "make a NeMo checkpoint of a Hugging Face folder, or back", _CONVERT)
    command.add_argument("source", metavar="SOURCE", help="a model folder of either form, or a hub id")
    command.add_argument("target", metavar="TARGET", help="a new folder")
    command.add_argument("--adapter", metavar="FOLDER", help="a NeMo checkpoint of a LoRA, to merge into the weights")
    command.add_argument("--quiet", action="store_true", help="no progress, only the result")
    command.set_defaults(run=_convert)


def _convert(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli.fault import fault_line
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.conversion import convert
    from nemo_qwen_hidden.errors import HiddenStatesError, RankError, UserError
    from nemo_qwen_hidden.parallel.launch import one_interrupt, output_to
    from nemo_qwen_hidden.progress import Event, Phase

    with Terminal(quiet=parsed.quiet) as terminal:

        def report(event: Event) -> None:
            if isinstance(event, Phase):
                terminal.note(event.text)

        with tempfile.NamedTemporaryFile(prefix="nemo_qwen_hidden-convert-", suffix=".log", delete=False) as file:
            log = Path(file.name)
        try:
            with one_interrupt(), output_to(log):
                done = convert(parsed.source, parsed.target, adapter=parsed.adapter, report=report)
        except (UserError, KeyboardInterrupt):
            log.unlink(missing_ok=True)
            raise
        except HiddenStatesError:
            raise
        except Exception as error:
            raise RankError(fault_line(error, log)) from error
        log.unlink(missing_ok=True)
        origin = f"as in {parsed.source}" + (f" with {parsed.adapter} merged in" if parsed.adapter else "")
        terminal.line(f"{done.direction}: {done.path} (weights sha256 {done.sha256[:12]}, {origin})")
    return 0
