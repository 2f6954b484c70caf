"""What to look at of a store of this package."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemo_qwen_hidden.checkpoint.fingerprint import weights_sha256
from nemo_qwen_hidden.checkpoint.opened import Weights
from nemo_qwen_hidden.doctor.checkup import chosen
from nemo_qwen_hidden.doctor.observation import Observation, Passage
from nemo_qwen_hidden.doctor.report import FAILED, OK, SKIPPED, Check, Finding
from nemo_qwen_hidden.doctor.rounding import UNIT_ROUNDOFF
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, SITES, HookPoint
from nemo_qwen_hidden.store.manifest import MEANS
from nemo_qwen_hidden.store.read.reader import Store

SAME_WEIGHTS = "weights are those that made the store"
_LOOKED_AT = 512
_WINDOW = "max_tokens"


def observe(store: Store, *, documents: int, tokens: int) -> Observation:
    """The beginnings of some documents of a store; of a store that keeps some rows alone, up to the first of these at
    the least.

    Raises:
        StoreError: it holds nothing that can be looked at, or a shard is not what the manifest says.
    """
    names = [name for name in store.hook_points if _known(store[name].hook_point)]
    if not names or not store.states:
        raise StoreError("--against", "must hold states at a site that is known", str(store.path))
    if store.manifest.pooling in MEANS:
        raise StoreError("--against", "must hold states of tokens, not means of them", str(store.path))
    compute = store.manifest.compute_dtype
    if compute not in UNIT_ROUNDOFF:
        raise StoreError("dtypes.compute", f"must be one of {', '.join(UNIT_ROUNDOFF)}", compute)
    passages = tuple(_passages(store, documents, tokens))
    rows = np.concatenate([np.arange(*_span(store, passage)) for passage in passages])
    spans = [_span(store, passage) for passage in passages]
    kept = np.isin(rows, np.concatenate([store.tokens.kept_rows(start, stop - start) for start, stop in spans]))
    values = store.read(store.state_of_rows(rows[kept]), names)
    present = torch.from_numpy(kept)
    states = {store[name].hook_point: _spread(values[name], present) for name in names}
    return Observation(
        passages=passages,
        states=states,
        compute=compute,
        stored=store.manifest.stored_dtype,
        kept=None if kept.all() else present,
    )


def _spread(values: Tensor, present: Tensor) -> Tensor:
    """fp32 [R, W] of states [n, ...] of the n rows that are there; 0 elsewhere."""
    flat = values.float().flatten(1)
    whole = flat.new_zeros(len(present), flat.shape[1])
    whole[present] = flat
    return whole


def _known(point: HookPoint) -> bool:
    return point.site in SITES and point.site != ATTN_WEIGHTS


def _passages(store: Store, documents: int, tokens: int) -> Iterator[Passage]:
    looked_at = range(min(store.documents, _LOOKED_AT))
    first_kept = [_first_kept(store, index) for index in looked_at]
    lengths = [
        0 if first is None else len(store.tokens.document_rows(index))
        for index, first in zip(looked_at, first_kept, strict=True)
    ]
    for index in chosen(lengths, documents):
        first = first_kept[index]
        assert first is not None, "a document without states has no length here"
        most = min(max(tokens, first + 1), _window(store, index))
        ids = torch.from_numpy(store.document(index).token_id[:most].astype("int64"))
        yield Passage(document=index, token_ids=ids)


def _first_kept(store: Store, document: int) -> int | None:
    """The place of the first token with a state, in the first window of a document; None where there is none."""
    rows = store.tokens.document_rows(document)
    kept = store.tokens.kept_rows(rows.start, min(len(rows), _window(store, document)))
    return int(kept[0]) - rows.start if len(kept) else None


def _window(store: Store, document: int) -> int:
    """Tokens of a document that saw each other."""
    part = next(part for part in store.manifest.parts if document < part.first_document + part.documents)
    window = part.data.get(_WINDOW)
    return window if isinstance(window, int) and window > 0 else len(store.tokens.document_rows(document))


def _span(store: Store, passage: Passage) -> tuple[int, int]:
    first = store.tokens.document_rows(passage.document).start
    return first, first + len(passage)


def same_weights(store: Store, folder: Path, weights: Weights) -> tuple[Check, list[Finding]]:
    """Whether the folder holds the weights that the manifest names. Reads all of them."""
    named = store.manifest.model.get("weights_sha256")
    if not isinstance(named, str):
        return Check(name=SAME_WEIGHTS, status=SKIPPED, detail="the manifest names none"), []
    found = weights_sha256(weights)
    if found == named:
        return Check(name=SAME_WEIGHTS, status=OK, detail=f"sha256 {found[:12]}"), []
    says = f"the store was made with other weights than those at {folder}"
    evidence = (f"sha256 {named[:12]} in the manifest, {found[:12]} in the folder",)
    check = Check(name=SAME_WEIGHTS, status=FAILED, detail=f"{named[:12]} there, {found[:12]} here")
    return check, [Finding(fault="other-weights", says=says, evidence=evidence)]
