"""A model folder of either form, Hugging Face's or NeMo's: its weights and its tokenizer."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from nemo_qwen_hidden.checkpoint import nemo_context
from nemo_qwen_hidden.checkpoint.architecture import Architecture
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.nemo_tensors import NemoTensors
from nemo_qwen_hidden.checkpoint.tensors import Raw, TensorFiles


class Weights(Protocol):
    """The tensors of a folder by Hugging Face's names, without ``model.``; those of a NeMo checkpoint are made of
    Megatron's as they are read."""

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""

    def raw(self) -> Callable[[str], Raw]:
        """Opens the files; what comes back gives the bytes of each tensor, and may be called from threads."""


def open_weights(folder: Path, architecture: Architecture) -> TensorFiles | NemoTensors:
    """The tensors of a folder, compared with what a Qwen2 of this architecture has; reads no tensor.

    Raises:
        CheckpointError: a tensor or a file is missing, cut off, or of the wrong shape.
        UnsupportedModelError: a tensor that no Qwen2 has, or one that is not floating point.
    """
    if nemo_context.is_nemo(folder):
        stored = NemoTensors.of(folder, architecture.shape)
        stored.check()
        return stored
    files = TensorFiles.of(folder)
    files.check(architecture.shape)
    return files


def tokenizer_folder(folder: Path) -> Path:
    """The folder with the model's tokenizer: its own, or what the context of a NeMo checkpoint names.

    Raises:
        CheckpointError: none is named, or it is on the hub and cannot be fetched.
        UnsupportedModelError: a tokenizer that is not Hugging Face's.
    """
    if not nemo_context.is_nemo(folder):
        return folder
    place = nemo_context.tokenizer_place(folder)
    return place if isinstance(place, Path) else locate(place)
