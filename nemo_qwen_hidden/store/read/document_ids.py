"""Whether stores hold documents of the same id, in memory that does not grow with the length of ids."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.fields import Fields, load_json
from nemo_qwen_hidden.store.files import open_inside
from nemo_qwen_hidden.store.manifest import Manifest


def shared_documents(folders: Sequence[Path], manifests: Sequence[Manifest]) -> Iterator[StoreError]:
    """The first document that another store holds under the same id, of each store.

    Ids are held as hashes of 8 bytes each, and looked at again where two of those are equal.
    """
    seen = np.zeros(0, np.uint64)
    suspects = np.zeros(0, np.uint64)
    for folder, manifest in zip(folders, manifests, strict=True):
        hashes = np.unique(np.fromiter((_hash(name) for name in _ids(folder, manifest)), np.uint64))
        suspects = np.union1d(suspects, np.intersect1d(seen, hashes, assume_unique=True))
        seen = np.union1d(seen, hashes)
    if not len(suspects):
        return
    owners: dict[str, Path] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        twice = next(
            (name for name in _suspected(folder, manifest, suspects) if owners.get(name, folder) != folder), None
        )
        if twice is not None:
            yield StoreError(f"{folder}: document id", f"must not be in {owners[twice]} too", twice)
        for name in _suspected(folder, manifest, suspects):
            owners.setdefault(name, folder)


def _suspected(folder: Path, manifest: Manifest, suspects: NDArray[np.uint64]) -> Iterator[str]:
    known = set(suspects.tolist())
    return (name for name in _ids(folder, manifest) if _hash(name) in known)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest())


def _ids(folder: Path, manifest: Manifest) -> Iterator[str]:
    for part in manifest.parts:
        name = str(folder / part.lines.file)
        with os.fdopen(open_inside(folder, part.lines.file), "rb") as lines:
            for number, line in enumerate(lines, start=1):
                at = f"{name}: line {number}"
                yield Fields(load_json(line, at), file=at).text("id")
