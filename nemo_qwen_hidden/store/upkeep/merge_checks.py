"""Whether stores can be one: made alike by one model, of documents that no two of them hold."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.fields import Fields, load_json
from nemo_qwen_hidden.store.files import open_inside
from nemo_qwen_hidden.store.manifest import Manifest

_NOT_ALWAYS_KNOWN = ("tokenizer.sha256", "final_norm.sha256")


def differences(named: Mapping[str, Manifest]) -> Iterator[StoreError]:
    """Everything in which a store differs from the first, though all must share it."""
    (first, model), *others = ((name, _shared(manifest)) for name, manifest in named.items())
    if model["model.weights_sha256"] is None:
        yield StoreError(f"{first}: model.weights_sha256", "must be known, to tell the model from others", None)
    for name, found in others:
        for field, value in found.items():
            unknown = field in _NOT_ALWAYS_KNOWN and None in (value, model[field])
            said = field == "hook_points.labels" and found["hook_points"] != model["hook_points"]
            if value != model[field] and not unknown and not said:
                yield StoreError(f"{name}: {field}", f"must be {model[field]!r}, as in {first}", value)


def _shared(manifest: Manifest) -> dict[str, Any]:
    """What stores that are merged must share."""
    windows = sorted({str(part.data.get("max_tokens")) for part in manifest.parts if part.rows})
    return {
        "hidden_size": manifest.hidden_size,
        "dtypes.compute": manifest.compute_dtype,
        "dtypes.stored": manifest.stored_dtype,
        "dtypes": dict(manifest.dtypes_extra),
        "model.weights_sha256": manifest.model.get("weights_sha256"),
        "model.architecture": manifest.model.get("architecture"),
        "tokenizer.sha256": manifest.tokenizer.get("sha256"),
        "hook_points": [str(point) for point in manifest.points],
        "hook_points.labels": [
            (entry.meaning, entry.norm, entry.huggingface_index, entry.divisor, dict(entry.extra))
            for entry in manifest.hook_points
        ],
        "final_norm.sha256": manifest.final_norm and manifest.final_norm.sha256,
        "data.max_tokens": windows,
        "unknown fields": dict(manifest.extra),
    }


def shared_data(named: Mapping[str, Manifest]) -> Iterator[StoreError]:
    """Data sets, and token tables, that two stores hold."""
    for (first, one), (second, other) in combinations(named.items(), 2):
        for what, digests in (("data.sha256", _data), ("tokens.sha256", _tables)):
            for digest in sorted(digests(one) & digests(other)):
                rule = f"must be of documents that are not in {first} too"
                yield StoreError(f"{second}: {what}", rule, digest)


def _data(manifest: Manifest) -> set[str]:
    return {str(part.data["sha256"]) for part in manifest.parts if part.documents and "sha256" in part.data}


def _tables(manifest: Manifest) -> set[str]:
    return {part.tokens.sha256 for part in manifest.parts if part.documents}


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
