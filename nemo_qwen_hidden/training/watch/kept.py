"""Callbacks whose arguments NeMo's checkpoints can hold."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from nemo.lightning.io.mixin import IOMixin


class KeptArguments(IOMixin):
    """NeMo writes into each checkpoint what a Trainer was made of, its callbacks among it. What is no plain value, such
    as a path or a range, NeMo 2.7.3 pickles there, and then refuses to read the pickle of a class that is not its own
    (``lightning/io/mixin.py:74``), so that ``load_context`` fails. Such arguments are kept as strings and lists."""

    def io_init(self, **kwargs: Any) -> Any:
        """As NeMo's."""
        return super().io_init(**{name: _plain(value) for name, value in kwargs.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str | list | tuple):
        return list(value)
    return value
