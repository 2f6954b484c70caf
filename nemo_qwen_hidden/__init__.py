"""Hidden states of Qwen2 models out of NeMo and Megatron-Core, the same on any parallel layout.

Importing this package is instant; each name below is imported where it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from nemo_qwen_hidden.version import __version__

if TYPE_CHECKING:
    from nemo_qwen_hidden.hookpoint import HookPoint
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.store.read.datasets import BatchLoader, DocumentBatches, RowBatches
    from nemo_qwen_hidden.store.read.reader import open_store
    from nemo_qwen_hidden.training.watch.callback import HiddenStatesCallback
    from nemo_qwen_hidden.training.watch.probe_set import ProbeSetCallback

__all__ = [
    "BatchLoader",
    "DocumentBatches",
    "HiddenStatesCallback",
    "HookPoint",
    "ProbeSetCallback",
    "Qwen2HiddenModel",
    "RowBatches",
    "__version__",
    "open_store",
]

_HOMES = {
    "BatchLoader": "nemo_qwen_hidden.store.read.datasets",
    "DocumentBatches": "nemo_qwen_hidden.store.read.datasets",
    "HiddenStatesCallback": "nemo_qwen_hidden.training.watch.callback",
    "HookPoint": "nemo_qwen_hidden.hookpoint",
    "ProbeSetCallback": "nemo_qwen_hidden.training.watch.probe_set",
    "Qwen2HiddenModel": "nemo_qwen_hidden.model.hidden_model",
    "RowBatches": "nemo_qwen_hidden.store.read.datasets",
    "open_store": "nemo_qwen_hidden.store.read.reader",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
