"""Whether stores can be one: made alike by one model, of documents that no two of them hold."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from nemo_qwen_hidden.errors import StoreError
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
        "pooling": manifest.pooling,
        "parts.kept": _kept(manifest),
        "parts.selection": manifest.parts[0].selection if manifest.parts else None,
        "dtypes.compute": manifest.compute_dtype,
        "dtypes.stored": manifest.stored_dtype,
        "dtypes": dict(manifest.dtypes_extra),
        "model.weights_sha256": manifest.model.get("weights_sha256"),
        "model.adapter.sha256": _adapter(manifest),
        "model.architecture": manifest.model.get("architecture"),
        "tokenizer.sha256": manifest.tokenizer.get("sha256"),
        "hook_points": [str(point) for point in manifest.points],
        "hook_points.labels": [
            (
                entry.meaning,
                entry.norm,
                entry.huggingface_index,
                entry.shape,
                entry.heads,
                entry.divisor,
                dict(entry.extra),
            )
            for entry in manifest.hook_points
        ],
        "final_norm.sha256": manifest.final_norm and manifest.final_norm.sha256,
        "data.max_tokens": windows,
        "unknown fields": dict(manifest.extra),
    }


def _adapter(manifest: Manifest) -> object:
    adapter = manifest.model.get("adapter")
    return adapter.get("sha256") if isinstance(adapter, Mapping) else None


def _kept(manifest: Manifest) -> str:
    return "some rows" if any(part.kept is not None for part in manifest.parts) else "all rows"


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
