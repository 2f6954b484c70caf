"""A NeMo checkpoint written as a Hugging Face folder, a few gigabytes at a time, without NeMo or transformers.

NeMo 2.7.3's own exporter (``collections/llm/gpt/model/qwen2.py: HFQwen2Exporter``) leaves out the norms where there is
no Transformer Engine, and builds objects from the checkpoint's context.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_qwen_hidden.checkpoint.adapter import Adapter, MergedWeights
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.nemo_context import CONTEXT
from nemo_qwen_hidden.checkpoint.nemo_tensors import NemoTensors
from nemo_qwen_hidden.checkpoint.opened import open_weights, tokenizer_folder
from nemo_qwen_hidden.checkpoint.tensors import EMBEDDING, OUTPUT, Raw, expected_shapes
from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

FILE_BYTES = 5_000_000_000
_GENERATION = "generation_config.json"
_PREFIX = "model."


def write_huggingface(
    source: Path,
    to: Path,
    *,
    adapter: Adapter | None = None,
    file_bytes: int = FILE_BYTES,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes config, weights, tokenizer and generation settings into the empty folder ``to``.

    The output layer is left out, and the model said to be tied, where it is the embedding table bit for bit: NeMo's
    importer unties what was tied.

    Args:
        adapter: is merged into the weights, see ``MergedWeights``.
        file_bytes: a file holds at most so many bytes of tensors, unless one is larger.
        report: is told how many tensors are written, and how many there are.

    Raises:
        CheckpointError, UnsupportedModelError: as for any model folder; also an untied model without an output layer.
    """
    architecture = read_architecture(source)
    weights = open_weights(source, architecture)
    assert isinstance(weights, NemoTensors)
    tied = _tied(weights, architecture)
    names = [*expected_shapes(architecture.shape), *(() if tied else (OUTPUT,))]
    read = weights.raw() if adapter is None else MergedWeights(weights, adapter).raw()
    files = _write_tensors(read, list(_groups(weights, names, file_bytes)), to, report)
    dtypes = {weights.dtype(name) for name in names}
    generation = _copied_generation(source, to)
    config: dict[str, Any] = {**architecture.config, "tie_word_embeddings": tied}
    config |= {name: generation[name] for name in ("bos_token_id", "eos_token_id") if name in generation}
    if len(dtypes) == 1:
        dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtypes.pop()]
        config |= {"dtype": dtype, "torch_dtype": dtype}  # the name since transformers 4.56, and the one before
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _copy_tokenizer(source, to)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (to / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tied(weights: NemoTensors, architecture: Architecture) -> bool:
    if OUTPUT not in weights.names:
        if not architecture.tied:
            raise CheckpointError("SOURCE", "must hold its output layer, as it is not tied", str(weights.folder))
        return True
    raw = weights.raw()
    output, embedding = raw(OUTPUT), raw(EMBEDDING)
    return output.dtype == embedding.dtype and output.data == embedding.data


def _write_tensors(
    read: Callable[[str], Raw], groups: list[list[str]], to: Path, report: Callable[[int, int], None]
) -> dict[str, list[str]]:
    """The names of the tensors in each file, by the file's name."""
    from safetensors.torch import save_file

    total = sum(map(len, groups))
    files: dict[str, list[str]] = {}
    done = 0
    for number, group in enumerate(groups, start=1):
        held: dict[str, torch.Tensor] = {}
        for name in group:
            held[name if name == OUTPUT else _PREFIX + name] = read(name).tensor()
            report(done := done + 1, total)
        single = len(groups) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(held, to / file, {"format": "pt"})
        files[file] = list(held)
    return files


def _groups(weights: NemoTensors, names: list[str], file_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in names:
        more = weights.bytes_of(name)
        if group and size + more > file_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += more
    yield group


def _copied_generation(source: Path, to: Path) -> dict[str, Any]:
    file = source / CONTEXT / "artifacts" / _GENERATION
    if not file.is_file():
        return {}
    shutil.copyfile(file, to / _GENERATION)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            "SOURCE", f"must have a readable {_GENERATION} in its context ({error})", str(file)
        ) from None
    return dict(found) if isinstance(found, dict) else {}


def _copy_tokenizer(source: Path, to: Path) -> None:
    """A model without one, or with one of another kind, is written without."""
    try:
        folder = tokenizer_folder(source)
    except (CheckpointError, UnsupportedModelError):
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and not (to / file.name).exists() and file.suffix in (".json", ".txt", ".jinja", ".model"):
            shutil.copyfile(file, to / file.name)
