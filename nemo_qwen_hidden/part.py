"""From a job's data to a part of a store: the token table, and which of its rows are to have states.

Two choices need more than one document at a time: tokens that are drawn of the whole data, and rows whose norms are far
above the others'. For these a first table holds what may be kept, and a second one what is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.config import MEANS, TokenSettings
from nemo_qwen_hidden.data.fingerprint import DataFingerprint
from nemo_qwen_hidden.data.selector import Selector
from nemo_qwen_hidden.data.tokenize import require_tokens
from nemo_qwen_hidden.data.tokenizer import Tokenizer, load_tokenizer
from nemo_qwen_hidden.errors import DataError
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.plan.outliers import NormOutliers
from nemo_qwen_hidden.plan.pooling import check_whole, weights
from nemo_qwen_hidden.plan.selection import keeps_everything
from nemo_qwen_hidden.store.entries import Part
from nemo_qwen_hidden.store.read.tokens import PartTokens
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter

CANDIDATES = "candidates"
Positions = NDArray[np.int64]
Norms = Callable[[int, int], NDArray[np.float32]]
"""(first, count) to the norms of some of the rows that may be kept, counted among these, float32 [count]."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """part: with its files in the folder that it was made in. tokenizer: fingerprint, None where the data were tokens
    already."""

    part: Part
    tokenizer: str | None


def make_part(job: Job, folder: Path, number: int, norms: Norms | None = None) -> Made:
    """The documents of a job as part ``number`` of a store, in ``folder``.

    Args:
        norms: of what may be kept, for ``tokens.max_norm``; without it no row is left out for its norm.

    Raises:
        UserError: data that cannot be used, or nothing of which is kept.
    """
    used: list[Tokenizer] = []

    def tokenizer() -> Tokenizer:
        if not used:
            used.append(load_tokenizer(job.tokenizer_folder))
        return used[0]

    tokens = job.settings.tokens
    selector = None if keeps_everything(tokens) else Selector(tokens, tokenizer)
    twice = selector is not None and (selector.samples_all or norms is not None)
    first = folder / CANDIDATES if twice else folder
    first.mkdir(exist_ok=True)
    fingerprint, windowed = DataFingerprint(), 0
    with TokenTableWriter(first, shard_rows=job.settings.store.shard_rows, part=number) as table:
        for document in job.documents(tokenizer):
            length = len(document.token_ids)
            may = None if selector is None else _listed(selector.kept(document), length)
            table.append(
                document_id=document.id,
                source=document.source,
                token_ids=document.token_ids,
                **(_kept(tokens, may, length) if may is not None and not twice else {"kept": may}),
            )
            fingerprint.update(document)
            windowed += length > job.batching.max_tokens
        part = table.close()
    require_tokens(part.rows, job.data_path)
    check_whole(tokens.pool, cut_documents=windowed, max_tokens=job.batching.max_tokens)
    if twice and selector is not None:
        part = _second_pass(job, selector, norms, PartTokens(first, part), folder, number)
    if part.states == 0:
        rule = "must keep a token of the data, or there would be no state"
        raise DataError("tokens", rule, selector and selector.as_dict())
    origin = {
        "path": job.settings.data.path or "embedded text",
        "sha256": fingerprint.hexdigest(),
        "max_tokens": job.batching.max_tokens,
        "documents_cut_into_windows": windowed,
    }
    selection = None if selector is None else selector.as_dict()
    return Made(part=replace(part, data=origin, selection=selection), tokenizer=used[0].fingerprint if used else None)


def _second_pass(
    job: Job, selector: Selector, norms: Norms | None, candidates: PartTokens, folder: Path, number: int
) -> Part:
    """The same documents with what is drawn of what may be kept, and without outliers."""
    tokens = job.settings.tokens
    outliers = None if norms is None or tokens.max_norm is None else NormOutliers(tokens.max_norm)
    looked_at = 0
    with TokenTableWriter(folder, shard_rows=job.settings.store.shard_rows, part=number) as table:
        for document in range(candidates.documents):
            rows, info = candidates.document_rows(document), candidates.document_info(document)
            may = candidates.kept_rows(rows.start, len(rows)) - rows.start
            kept = _listed(selector.drawn(rows.start, len(rows), may), len(rows))
            if outliers is not None and norms is not None:
                marked = outliers.mark(norms(looked_at, len(kept)))
                looked_at, kept = looked_at + len(kept), kept[~marked]
            table.append(
                document_id=info.id,
                source=info.source,
                token_ids=np.array(candidates.token_id[rows.start : rows.stop]),
                **_kept(tokens, kept, len(rows)),
            )
        return table.close()


def _listed(positions: Positions | None, length: int) -> Positions:
    return np.arange(length, dtype=np.int64) if positions is None else positions


def _kept(tokens: TokenSettings, positions: Positions, length: int) -> dict[str, Any]:
    """What the token table says of a document: of a mean, the row that it stands at, and what each token weighs."""
    if tokens.pool not in MEANS:
        return {"kept": positions}
    weight = np.zeros(length, np.float32)
    if not len(positions):
        return {"kept": positions, "weight": weight}
    weight[positions] = weights(tokens.pool, positions)
    return {"kept": np.array([length - 1]), "weight": weight}


def state_counts(job: Job) -> Iterator[tuple[int, int, int]]:
    """Of each document of a job its tokens, its windows, and how many states it would have, for a preview. Rows that
    are left out for their norm, and what a draw of the whole data leaves, are known only when the job runs."""
    tokens = job.settings.tokens
    selector = None if keeps_everything(tokens) else Selector(tokens, lambda: load_tokenizer(job.tokenizer_folder))
    for document in job.documents(lambda: load_tokenizer(job.tokenizer_folder)):
        length = len(document.token_ids)
        kept = length if selector is None else len(_listed(selector.kept(document), length))
        states = min(kept, 1) if tokens.pool in MEANS else kept
        yield length, -(-length // job.batching.max_tokens), states
