"""A folder in torch's distributed checkpoint format, as Megatron writes it: what it holds, and reading parts of it.

Nothing in it is executed. ``.metadata`` is a pickle; it is read by an unpickler for which every class is a record of
ours without behaviour, and which knows no other name. Tensors are read with ``torch.load(weights_only=True)``. Objects,
such as Megatron's ``common.pt`` and ``_extra_state``, are never read.
"""

import io
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_qwen_hidden.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights"
METADATA, CONFIG = ".metadata", "metadata.json"
_BACKEND = "torch_dist"
DTYPES = {  # of torch: of safetensors
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_CLASSES = {
    "pathlib": ("PosixPath", "WindowsPath"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A block of a tensor: where it begins in it, its sizes, and which bytes of which file hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor: its dtype by safetensors' names, its shape, and the blocks that it was written in."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DistributedFiles:
    """The tensors of a folder by name. setting: what named the folder, for errors."""

    folder: Path
    tensors: Mapping[str, Stored]
    setting: str

    @classmethod
    def of(cls, folder: Path, setting: str) -> "DistributedFiles":
        """Reads ``metadata.json`` and ``.metadata`` alone, and compares what they say with the files' sizes.

        Raises:
            CheckpointError: something is missing, cut off, or not what it should be.
            UnsupportedModelError: another of Megatron's formats.
        """
        _check_backend(folder, setting)
        try:
            record = _Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
            tensors = dict(_tensors(record))
        except FileNotFoundError:
            rule = f"must hold `{WEIGHTS}/{METADATA}`, which is written last: without it a checkpoint is not whole"
            raise CheckpointError(setting, rule, str(folder.parent)) from None
        except (OSError, pickle.UnpicklingError, EOFError, *_MALFORMED) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            rule = f"must hold a `{WEIGHTS}/{METADATA}` of torch's distributed format ({reason})"
            raise CheckpointError(setting, rule, str(folder.parent)) from None
        found = cls(folder=folder, tensors=tensors, setting=setting)
        found._check_files()
        return found

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for stored in self.tensors.values():
            for chunk in stored.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if Path(name).name != name or not path.is_file():
                rule = f"must hold `{WEIGHTS}/{name}`, which its {METADATA} names"
                raise CheckpointError(self.setting, rule, str(self.folder.parent))
            if (size := path.stat().st_size) < end:
                rule = f"must have {end} bytes in `{WEIGHTS}/{name}`, as its {METADATA} says"
                raise CheckpointError(self.setting, rule, size)

    def read(self, name: str, *wanted: slice) -> "torch.Tensor":
        """A part of a tensor (slices of as many axes as are given, from the first on), in the dtype of the file.

        Reads the blocks that it meets, one at a time.

        Raises:
            CheckpointError: the blocks are damaged, or leave a part of it out.
        """
        import torch

        stored = self.tensors[name]
        full = (*wanted, *[slice(None)] * (len(stored.shape) - len(wanted)))
        spans = [range(*each.indices(size)) for each, size in zip(full, stored.shape, strict=True)]
        sizes = [len(span) for span in spans]
        out: torch.Tensor | None = None
        filled = 0
        for chunk in stored.chunks:
            common = [
                range(max(span.start, offset), min(span.stop, offset + size))
                for span, offset, size in zip(spans, chunk.offsets, chunk.sizes, strict=True)
            ]
            if not all(common):
                continue
            inside = [slice(c.start - o, c.stop - o) for c, o in zip(common, chunk.offsets, strict=True)]
            block = self._block(name, chunk)[tuple(inside)]
            if list(block.shape) == sizes:
                return block
            if out is None:
                out = torch.empty(sizes, dtype=block.dtype)
            target = [slice(c.start - s.start, c.stop - s.start) for c, s in zip(common, spans, strict=True)]
            out[tuple(target)] = block
            filled += block.numel()
        if out is None or filled != out.numel():
            raise CheckpointError(self.setting, f"must hold all of the tensor `{name}`", str(self.folder.parent))
        return out

    def _block(self, name: str, chunk: Chunk) -> "torch.Tensor":
        import torch

        try:
            with open(self.folder / chunk.file, "rb", buffering=0) as file:
                window: Any = _Window(file, chunk.start, chunk.length)  # Any: less than torch's type asks for
                block: torch.Tensor = torch.load(window, map_location="cpu", weights_only=True)
            return block.reshape(chunk.sizes)
        except (RuntimeError, pickle.UnpicklingError, EOFError, *_MALFORMED) as error:
            reason = str(error).strip().partition("\n")[0]
            rule = f"must hold a readable `{name}` in `{WEIGHTS}/{chunk.file}` ({reason})"
            raise CheckpointError(self.setting, rule, str(self.folder.parent)) from None


class _Window(io.RawIOBase):
    """Some bytes of a file as a file: no second copy of them in memory."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length = file, start, length
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + base + offset) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int | None:
        return self._file.readinto(memoryview(buffer)[: max(0, self._length - self.tell())])


_MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)


class _Record:
    """What any class of the format is read as: its constructor's arguments and its state, nothing more."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        raise pickle.UnpicklingError(f"it names {module}.{name}, which the format has no use for")


def _tensors(metadata: Any) -> Iterator[tuple[str, Stored]]:
    places = {
        (index.fqn, tuple(index.offset)): info
        for index, info in metadata.storage_data.items()
        if getattr(index, "offset", None) is not None
    }
    for name, record in metadata.state_dict_metadata.items():
        if type(record).__name__ != "TensorStorageMetadata":
            continue
        chunks = [_chunk(name, chunk, places) for chunk in record.chunks]
        yield name, Stored(dtype=record.properties.state[0], shape=_sizes(record.size), chunks=tuple(chunks))


def _chunk(name: str, record: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> Chunk:
    offsets, sizes = _sizes(record.offsets), _sizes(record.sizes)
    info = places.get((name, offsets))
    if info is None:
        raise ValueError(f"the block of {name} at {list(offsets)} is nowhere")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"the bytes of {name} are transformed ({info.transform_descriptors})")
    start, length = _sizes((info.offset, info.length))
    return Chunk(offsets=offsets, sizes=sizes, file=str(info.relative_path), start=start, length=length)


def _sizes(values: Sequence[object]) -> tuple[int, ...]:
    numbers = tuple(value for value in values if type(value) is int and value >= 0)
    if len(numbers) != len(values):
        raise ValueError(f"{list(values)} are not sizes")
    return numbers


def _check_backend(folder: Path, setting: str) -> None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        backend = config["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "there is none" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        rule = f"must hold a `{WEIGHTS}/{CONFIG}` of Megatron's ({reason})"
        raise CheckpointError(setting, rule, str(folder.parent)) from None
    if backend != _BACKEND:
        raise UnsupportedModelError(f"{setting}: {WEIGHTS}/{CONFIG}: sharded_backend", f"must be '{_BACKEND}'", backend)
