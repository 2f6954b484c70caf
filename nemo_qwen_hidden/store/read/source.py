"""Where the files of a store are: a folder of this machine here, another file system in ``remote``."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.files import open_inside
from nemo_qwen_hidden.store.header import Header
from nemo_qwen_hidden.store.read.maps import map_bytes, map_tensors

MOST_READ_BYTES = 1 << 30  # a manifest of three million shards


class Column(Protocol):
    """An array of one axis that may read its numbers when it is indexed: by an int (gives a scalar), or a slice or
    an integer array (gives a numpy array). ``numpy.asarray`` reads all of it."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class Source(Protocol):
    """The files of one store, by their paths in it, which ``files.check_name`` has passed.

    Attributes:
        location: of the store, for people.

    Raises (every method but ``name`` and ``exists``):
        StoreError: the file is absent or not what it should be; names it.
    """

    location: str

    def name(self, file: str) -> str:
        """``file`` as errors call it."""
        ...

    def exists(self, file: str) -> bool:
        """Whether there is something of that name."""
        ...

    def read(self, file: str) -> bytes:
        """All of a small file."""
        ...

    def lines(self, file: str) -> NDArray[np.uint8]:
        """All of a file."""
        ...

    def tensors(self, file: str) -> tuple[Header, dict[str, Column]]:
        """Header and tensors of a safetensors file."""
        ...


class Folder:
    """A ``Source`` on this machine; files are memory maps."""

    def __init__(self, path: Path) -> None:
        self.path, self.location = path, str(path)

    def name(self, file: str) -> str:
        return str(self.path / file)

    def exists(self, file: str) -> bool:
        return os.path.lexists(self.path / file)

    def read(self, file: str) -> bytes:
        with os.fdopen(open_inside(self.path, file), "rb") as opened:
            check_small(os.fstat(opened.fileno()).st_size, self.name(file))
            return opened.read()

    def lines(self, file: str) -> NDArray[np.uint8]:
        return map_bytes(self.path, file)

    def tensors(self, file: str) -> tuple[Header, dict[str, Column]]:
        header, arrays = map_tensors(self.path, file)
        return header, dict(arrays)


def check_small(size: int, file: str) -> None:
    """StoreError where a file that is read at once is too large for it."""
    if size > MOST_READ_BYTES:
        raise StoreError(file, f"must be at most {MOST_READ_BYTES} bytes long", size)
