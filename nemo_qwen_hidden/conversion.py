"""A model folder made into one of the other form: Hugging Face's into NeMo's, NeMo's into Hugging Face's."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.fingerprint import weights_sha256
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.nemo_context import is_nemo
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.checkpoint.tensors import OUTPUT
from nemo_qwen_hidden.checkpoint.to_huggingface import write_huggingface
from nemo_qwen_hidden.errors import CheckpointError, HiddenStatesError
from nemo_qwen_hidden.progress import Phase, Report, silent

TO_NEMO, TO_HUGGINGFACE = "Hugging Face to NeMo", "NeMo to Hugging Face"

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """direction: in words. sha256: of the weights, which both folders have."""

    direction: str
    path: Path
    sha256: str


def convert(source: str, target: str, *, report: Report = silent) -> Converted:
    """Writes the other form of the model at ``source`` (a folder or hub id) to ``target``, which appears once all of it
    is there and its weights have been compared with the source's, bit by bit.

    Raises:
        CheckpointError, UnsupportedModelError: a source that cannot be opened, or a target that is there.
    """
    folder, to = locate(source, "SOURCE"), Path(target).expanduser()
    if to.exists() or to.is_symlink():
        raise CheckpointError("TARGET", "must not be there yet", target)
    if not to.parent.is_dir():
        raise CheckpointError("TARGET", "must lie in a folder that is there", target)
    architecture = read_architecture(folder)
    report(Phase("reading the source"))
    before = weights_sha256(open_weights(folder, architecture))
    beside = to.with_name(f".{to.name}.converting")
    if beside.exists():
        shutil.rmtree(beside)  # of a conversion that was killed
    try:
        beside.mkdir()
    except OSError as error:
        rule = f"must lie in a folder that can be written ({error.strerror})"
        raise CheckpointError("TARGET", rule, target) from error
    try:
        direction = TO_HUGGINGFACE if is_nemo(folder) else TO_NEMO
        report(Phase(direction))
        if direction == TO_HUGGINGFACE:
            write_huggingface(folder, beside)
        else:
            _import(folder, beside, architecture)
        report(Phase("comparing the weights"))
        _compare(folder, beside, before)
        beside.rename(to)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Converted(direction=direction, path=to, sha256=before)


def _import(folder: Path, to: Path, architecture: Architecture) -> None:
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
    from nemo_qwen_hidden.training.importer import import_huggingface

    import_huggingface(folder, to)


def _compare(source: Path, target: Path, before: str) -> None:
    """NeMo's importer passes over what it cannot place; so nothing is believed."""
    made = [open_weights(folder, read_architecture(folder)) for folder in (source, target)]
    if weights_sha256(made[1]) != before:
        raise HiddenStatesError("the weights that were written are not those of the source")
    one, other = (weights.raw() for weights in made)
    if all(OUTPUT in weights.names for weights in made) and one(OUTPUT).data != other(OUTPUT).data:
        raise HiddenStatesError("the output layer that was written is not that of the source")
