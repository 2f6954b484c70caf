"""What to look at of states that another program has stored. docs/doctor.md says in which forms.

One safetensors file, or a folder of .npy files, with

    token_ids        integers [tokens], or [documents, tokens] where they are padded
    lengths          integers [documents], tokens of each document; without it one document, or rows that are all full
    attention_mask   [documents, tokens], not 0 at tokens and 0 at padding, on whichever side; instead of lengths
    resid_post@3     states, [tokens, H] or [documents, tokens, H], by the name of their hook point, or
    hidden_states    the tuple of transformers, stacked: [layers + 1, ...as above, H], of which the last is normed

``nemo-qwen-hidden export --to npy`` writes such a folder (with ``token_id`` and ``document`` for the first two).
"""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_qwen_hidden.doctor.checkup import chosen
from nemo_qwen_hidden.doctor.observation import Observation, Passage
from nemo_qwen_hidden.errors import ConfigError, StoreError
from nemo_qwen_hidden.hookpoint import EMBED, FINAL_NORM, RESID_POST, HookPoint

SETTING = "--against"
TUPLE, IDS, LENGTHS, MASK = "hidden_states", "token_ids", "lengths", "attention_mask"
_EXPORTED_IDS, _EXPORTED_DOCUMENT = "token_id", "document"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_RULE = "must hold `token_ids`, and states by the name of their hook point or as `hidden_states` (docs/doctor.md)"


def is_foreign(path: Path) -> bool:
    """Whether ``path`` is a file, or a folder of arrays, and not a store of this package."""
    return path.is_file() or (path.is_dir() and not (path / "manifest.json").exists() and any(path.glob("*.npy")))


def observe(path: Path, *, num_layers: int, documents: int, tokens: int, compute: str | None = None) -> Observation:
    """The beginnings of some documents.

    compute: the dtype that the model ran in; None takes that of the states.

    Raises:
        StoreError: it is in none of the forms; says which is missing.
    """
    arrays = _arrays(path)
    ids, rows, lengths = _tokens(arrays, path)
    states = _named(arrays, path, num_layers)
    if len({values.dtype for values in states.values()}) != 1:
        raise StoreError(str(path), "must hold states of one dtype", sorted({str(v.dtype) for v in states.values()}))
    dtype = _DTYPES.get(next(iter(states.values())).dtype)
    if dtype is None:
        raise StoreError(
            str(path), "must hold states in float32, bfloat16 or float16", str(next(iter(states.values())).dtype)
        )
    size = ids.numel()
    for point, values in states.items():
        if values.ndim < 2 or values[..., 0].numel() != size:
            rule = f"must have a state for each of the {size} places of `token_ids`"
            raise StoreError(f"{path}: {point}", rule, list(values.shape))
    starts = [0, *accumulate(lengths)]
    passages, taken = [], []
    for index in chosen(lengths, documents):
        where = rows[starts[index] : starts[index + 1]][:tokens]
        passages.append(Passage(document=index, token_ids=ids.flatten()[where]))
        taken.append(where)
    places = torch.cat(taken)
    found = {point: values.reshape(size, -1)[places].float() for point, values in states.items()}
    return Observation(passages=tuple(passages), states=found, compute=compute or dtype, stored=dtype)


def _arrays(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return {file.stem: torch.from_numpy(np.load(file, allow_pickle=False)) for file in sorted(path.glob("*.npy"))}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise StoreError(
            SETTING, f"must be a store, a safetensors file or a folder of .npy ({error})", str(path)
        ) from None


def _tokens(arrays: Mapping[str, Tensor], path: Path) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids in the shape of the file; the flat places of those that are no padding, document after document; and
    the length of each document."""
    ids = arrays.get(IDS, arrays.get(_EXPORTED_IDS))
    if ids is None or ids.ndim not in (1, 2) or ids.is_floating_point() or not ids.numel():
        raise StoreError(str(path), _RULE, sorted(arrays))
    ids = ids.long()
    every = torch.arange(ids.numel())
    if (mask := arrays.get(MASK)) is not None:
        _fits(path, MASK, mask, ids)
        kept = mask != 0
        return ids, every[kept.flatten()], kept.sum(dim=1).tolist()
    if (lengths := arrays.get(LENGTHS)) is not None:
        counts = [int(length) for length in lengths.flatten().tolist()]
        if ids.ndim == 1 and min(counts) >= 0 and sum(counts) == len(ids):
            return ids, every, counts
        if ids.ndim == 2 and len(counts) == len(ids) and 0 <= min(counts) <= max(counts) <= ids.shape[1]:
            kept = torch.arange(ids.shape[1])[None] < torch.tensor(counts)[:, None]
            return ids, every[kept.flatten()], counts
        raise StoreError(f"{path}: {LENGTHS}", f"must fit `{IDS}` of shape {list(ids.shape)}", counts)
    if (document := arrays.get(_EXPORTED_DOCUMENT)) is not None and ids.ndim == 1:
        _fits(path, _EXPORTED_DOCUMENT, document, ids)
        return ids, every, torch.bincount(document.long()).tolist()
    return ids, every, [len(ids)] if ids.ndim == 1 else [ids.shape[1]] * len(ids)


def _fits(path: Path, name: str, values: Tensor, ids: Tensor) -> None:
    if values.shape != ids.shape:
        raise StoreError(
            f"{path}: {name}", f"must have the shape of the token ids, {list(ids.shape)}", list(values.shape)
        )


def _named(arrays: Mapping[str, Tensor], path: Path, num_layers: int) -> dict[HookPoint, Any]:
    found: dict[HookPoint, Tensor] = {}
    for name, values in arrays.items():
        try:
            point = HookPoint.parse(name)
        except ConfigError:
            continue
        if point.layer is not None and point.layer >= num_layers:
            raise StoreError(f"{path}: {name}", f"must be of one of the model's {num_layers} layers", point.layer)
        found[point] = values
    if (stacked := arrays.get(TUPLE)) is not None:
        if len(stacked) != num_layers + 1:
            rule = f"must hold {num_layers + 1} states, the embeddings and one for each of the model's layers"
            raise StoreError(f"{path}: {TUPLE}", rule, len(stacked))
        points = [
            HookPoint(EMBED),
            *(HookPoint(RESID_POST, layer) for layer in range(num_layers - 1)),
            HookPoint(FINAL_NORM),
        ]
        found |= dict(zip(points, stacked, strict=True))
    if not found:
        raise StoreError(str(path), _RULE, sorted(arrays))
    return found
