"""What to look at of a store of this package."""

from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_qwen_hidden.checkpoint.fingerprint import weights_sha256
from nemo_qwen_hidden.checkpoint.tensors import TensorFiles
from nemo_qwen_hidden.doctor.checkup import chosen
from nemo_qwen_hidden.doctor.observation import Observation, Passage
from nemo_qwen_hidden.doctor.report import FAILED, OK, SKIPPED, Check, Finding
from nemo_qwen_hidden.doctor.rounding import UNIT_ROUNDOFF
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, SITES, HookPoint
from nemo_qwen_hidden.store.read.reader import Store

SAME_WEIGHTS = "weights are those that made the store"
_LOOKED_AT = 512
_WINDOW = "max_tokens"


def observe(store: Store, *, documents: int, tokens: int) -> Observation:
    """The beginnings of some documents of a store.

    Raises:
        StoreError: it holds nothing that can be looked at, or a shard is not what the manifest says.
    """
    names = [name for name in store.hook_points if _known(store[name].hook_point)]
    if not names or not store.rows:
        raise StoreError("--against", "must hold rows at a site that is known", str(store.path))
    compute = store.manifest.compute_dtype
    if compute not in UNIT_ROUNDOFF:
        raise StoreError("dtypes.compute", f"must be one of {', '.join(UNIT_ROUNDOFF)}", compute)
    passages = tuple(_passages(store, documents, tokens))
    rows = torch.cat([torch.arange(*_span(store, passage)) for passage in passages])
    values = store.read(rows, names)
    states = {store[name].hook_point: values[name].float().flatten(1) for name in names}
    return Observation(passages=passages, states=states, compute=compute, stored=store.manifest.stored_dtype)


def _known(point: HookPoint) -> bool:
    return point.site in SITES and point.site != ATTN_WEIGHTS


def _passages(store: Store, documents: int, tokens: int) -> Iterator[Passage]:
    looked_at = range(min(store.documents, _LOOKED_AT))
    lengths = [len(store.tokens.document_rows(index)) for index in looked_at]
    for index in chosen(lengths, documents):
        most = min(tokens, _window(store, index))
        ids = torch.from_numpy(store.document(index).token_id[:most].astype("int64"))
        yield Passage(document=index, token_ids=ids)


def _window(store: Store, document: int) -> int:
    """Tokens of a document that saw each other."""
    part = next(part for part in store.manifest.parts if document < part.first_document + part.documents)
    window = part.data.get(_WINDOW)
    return window if isinstance(window, int) and window > 0 else len(store.tokens.document_rows(document))


def _span(store: Store, passage: Passage) -> tuple[int, int]:
    first = store.tokens.document_rows(passage.document).start
    return first, first + len(passage)


def same_weights(store: Store, folder: Path) -> tuple[Check, list[Finding]]:
    """Whether the folder holds the weights that the manifest names. Reads all of them."""
    named = store.manifest.model.get("weights_sha256")
    if not isinstance(named, str):
        return Check(name=SAME_WEIGHTS, status=SKIPPED, detail="the manifest names none"), []
    found = weights_sha256(TensorFiles.of(folder))
    if found == named:
        return Check(name=SAME_WEIGHTS, status=OK, detail=f"sha256 {found[:12]}"), []
    says = f"the store was made with other weights than those at {folder}"
    evidence = (f"sha256 {named[:12]} in the manifest, {found[:12]} in the folder",)
    check = Check(name=SAME_WEIGHTS, status=FAILED, detail=f"{named[:12]} there, {found[:12]} here")
    return check, [Finding(fault="other-weights", says=says, evidence=evidence)]
