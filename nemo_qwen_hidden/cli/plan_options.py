"""Options of ``plan``. Apart from what they do, which takes longer to import than to say ``--help``."""

import argparse
import math

from nemo_qwen_hidden.checkpoint.published import NAMES

GPU_HOUR_USD = 2.0


def add_options(command: argparse.ArgumentParser) -> None:
    """Those that say what is not here."""
    command.add_argument("--gpus", type=int, metavar="N", help="as if on N H100 GPUs, 8 in a machine")
    command.add_argument("--tokens", type=_tokens, metavar="N", help="as if over N tokens, such as 1e9; reads no data")
    command.add_argument("--shape", metavar="SIZE", help=f"Qwen2.5 of this size, without its files: {', '.join(NAMES)}")
    help_text = f"of a GPU (of a rank, without one) and hour; {GPU_HOUR_USD:g} with --gpus, which is no quotation"
    command.add_argument("--price", type=_amount, metavar="USD", help=help_text)
    command.add_argument("--disk", type=_amount, metavar="GB/S", help="what the storage takes of all machines (1; 100)")


def _tokens(text: str) -> int:
    return int(_amount(text))


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, but is {text!r} instead")
    return number
