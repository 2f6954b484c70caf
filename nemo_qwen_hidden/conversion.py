"""A model folder made into one of the other form: Hugging Face's into NeMo's, NeMo's into Hugging Face's."""

import errno
import fcntl
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_qwen_hidden.checkpoint.adapter import Adapter, MergedWeights
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.fingerprint import weights_sha256
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.nemo_context import is_nemo
from nemo_qwen_hidden.checkpoint.opened import Weights, open_weights
from nemo_qwen_hidden.checkpoint.tensors import OUTPUT
from nemo_qwen_hidden.checkpoint.to_huggingface import write_huggingface
from nemo_qwen_hidden.errors import CheckpointError, HiddenStatesError, UnsupportedModelError
from nemo_qwen_hidden.progress import Phase, Report, silent
from nemo_qwen_hidden.store.files import sync_files, sync_folder

TO_NEMO, TO_HUGGINGFACE = "Hugging Face to NeMo", "NeMo to Hugging Face"

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """direction: in words. sha256: of the weights that were written: those of the source, or of it and the adapter."""

    direction: str
    path: Path
    sha256: str


def convert(source: str, target: str, *, adapter: str | None = None, report: Report = silent) -> Converted:
    """Writes the other form of the model at ``source`` (a folder or hub id) to ``target``, which appears once all of it
    is there, durable, and its weights have been compared with the source's, bit by bit.

    Args:
        adapter: a NeMo checkpoint of a LoRA adapter of this model: merged in, in fp32, and rounded once, to the dtype
            that each weight has in the source.

    Raises:
        CheckpointError, UnsupportedModelError: a source or an adapter that cannot be opened, or a target that is there,
            or cannot be written.
    """
    folder, to = locate(source, "SOURCE"), Path(target).expanduser()
    if to.exists() or to.is_symlink():
        raise CheckpointError("TARGET", "must not be there yet", target)
    if not to.parent.is_dir():
        raise CheckpointError("TARGET", "must lie in a folder that is there", target)
    architecture = read_architecture(folder)
    weights: Weights = open_weights(folder, architecture)
    changes = None if adapter is None else Adapter.of(adapter, architecture.shape, "--adapter")
    if changes is not None:
        weights = MergedWeights(weights, changes)
    report(Phase("reading the source"))
    before = weights_sha256(weights)
    direction = TO_HUGGINGFACE if is_nemo(folder) else TO_NEMO
    with _appearing(to) as beside:
        report(Phase(direction))
        if direction == TO_HUGGINGFACE:
            write_huggingface(folder, beside, adapter=changes)
        else:
            _import(folder, beside, architecture, changes)
        report(Phase("comparing the weights"))
        _compare(weights, before, beside)
    return Converted(direction=direction, path=to, sha256=before)


@contextmanager
def _appearing(to: Path) -> Iterator[Path]:
    """A new folder beside ``to`` that is given its name when all went well, and else removed. It is locked meanwhile:
    one that nobody holds is what a process that was killed has left."""
    beside = to.with_name(f".{to.name}.converting")
    try:
        beside.mkdir(exist_ok=True)
        held = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        rule = f"must lie in a folder that can be written ({error.strerror})"
        raise CheckpointError("TARGET", rule, str(to)) from error
    try:
        _lock(held, beside, to)
        try:
            _empty(beside)
            yield beside
            _make_durable(beside)
            _rename(beside, to)
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)
            if not isinstance(error, HiddenStatesError):
                _name_full_disk(error, to)
            raise
    finally:
        os.close(held)


def _lock(held: int, beside: Path, to: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(held), beside.lstat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        raise CheckpointError("TARGET", "must be a folder that no other conversion writes", str(to))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _make_durable(folder: Path) -> None:
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    sync_files(path for path in paths if path.is_file())
    for path in (folder, *paths):
        if path.is_dir():
            sync_folder(path)


def _rename(folder: Path, to: Path) -> None:
    try:
        folder.rename(to)
    except OSError as error:
        raise CheckpointError("TARGET", f"must not be there yet ({error.strerror})", str(to)) from error
    sync_folder(to.parent)


def _name_full_disk(error: BaseException, to: Path) -> None:
    """safetensors and Megatron wrap what the system has said."""
    said = "".join(traceback.format_exception(error))
    for reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        if reason in said:
            raise CheckpointError("TARGET", f"must have room for the model ({reason})", str(to)) from error


def _import(folder: Path, to: Path, architecture: Architecture, adapter: Adapter | None) -> None:
    weights = open_weights(folder, architecture)
    raw = weights.raw()
    dtypes = sorted({_DTYPES[raw(name).dtype] for name in weights.names})
    named = architecture.config.get("dtype", architecture.config.get("torch_dtype", "float32"))
    if dtypes != [named]:
        rule = f"must be the dtype of all of its tensors ({', '.join(dtypes)}): NeMo's importer goes by it"
        raise CheckpointError("SOURCE: config.json: dtype", rule, named)
    for name, why in (("tokenizer_config.json", "a tokenizer"), ("generation_config.json", "it")):
        if not (folder / name).is_file():
            raise CheckpointError("SOURCE", f"must hold {name}: NeMo's importer needs {why}", str(folder))
    for name in ("config.json", "tokenizer_config.json"):
        # NeMo 2.7.3 asks transformers to trust it (lightning/io/connector.py:323)
        if "auto_map" in (folder / name).read_text(encoding="utf-8"):
            rule = "must have no `auto_map`: NeMo's importer would execute the code that it names"
            raise UnsupportedModelError(f"SOURCE: {name}", rule, str(folder))
    from nemo_qwen_hidden.training.importer import import_huggingface

    import_huggingface(folder, to, adapter)


def _compare(wanted: Weights, sha256: str, target: Path) -> None:
    """NeMo's importer passes over what it cannot place; so nothing is believed."""
    made = open_weights(target, read_architecture(target))
    if weights_sha256(made) != sha256:
        raise HiddenStatesError("the weights that were written are not those of the source")
    if OUTPUT in wanted.names and OUTPUT in made.names and wanted.raw()(OUTPUT).data != made.raw()(OUTPUT).data:
        raise HiddenStatesError("the output layer that was written is not that of the source")
