"""What a job makes of what lies at its path: a new store, one that goes on, a larger one, or nothing at all."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_qwen_hidden.errors import StoreError, raise_all
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, HookPoint, by_depth
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.store.captured import PHASE
from nemo_qwen_hidden.store.entries import FileEntry, HookPointEntry, Part
from nemo_qwen_hidden.store.format import FINAL_NORM_FILE
from nemo_qwen_hidden.store.manifest import MEANS, Manifest
from nemo_qwen_hidden.store.write.session import Found

NEW, RESUMED, HOOK_POINTS, DOCUMENTS = "new store", "resumed", "hook points added", "documents added"


def check_settings(
    job: Job,
    found: Found,
    model: Mapping[str, Any],
) -> None:
    """Whether the settings fit to the store that was found, as far as can be said before the data are read.

    Raises:
        UserError: the store was made with others; names each difference.
    """
    store = found.unfinished or found.finished
    adding = job.settings.store.add
    if store is None:
        if adding is not None:
            rule = "must be the folder of a store, to which `store.add` adds"
            raise StoreError("store.path", rule, str(job.store_path))
        return
    if found.grows or any(PHASE in part.data for part in store.parts):
        rule = "must be a new folder or an extraction's store, and captured steps of a training run are there"
        raise StoreError("store.path", f"{rule} (store.overwrite=true replaces them)", str(job.store_path))
    settings, where = job.settings, _where(job, found)
    expected = [
        ("model.path", "weights of sha256 {}", store.model.get("weights_sha256"), model["weights_sha256"]),
        ("model.adapter", "{}", _adapter(store.model), _adapter(model)),
        ("model.path", "a config.json with {}", store.model.get("architecture"), model["architecture"]),
        ("precision.compute", "{}", store.compute_dtype, settings.precision.compute),
        ("precision.stored", "{}", store.stored_dtype, settings.stored_dtype),
        ("data.max_tokens", "{}", store.parts[0].data.get("max_tokens"), job.batching.max_tokens),
        ("tokens.pool", "{}", store.pooling or "none", settings.tokens.pool),
    ]
    expected += [
        ("capture.heads", "{}", _heads(entry.heads), _heads(_asked_heads(job)))
        for entry in store.hook_points
        if entry.point.site == ATTN_WEIGHTS and entry.point in job.points
    ]
    wanted = _names(job.points)
    if adding == "hook_points" and found.unfinished is not None:
        missing = {point for point, _ in store.missing()}
        if not missing <= set(job.points) <= set(store.points):
            expected.append(
                ("capture.hook_points", "{}", _names(by_depth(missing, job.architecture.shape.num_layers)), wanted)
            )
    elif adding != "hook_points":
        expected.append(("capture.hook_points", "{}", _names(store.points), wanted))
    raise_all(
        [
            StoreError(setting, f"must be {words.format(_shown(old))}, as {where}", new)
            for setting, words, old, new in expected
            if old != new
        ]
    )


def check_data(job: Job, found: Found, part: Part, tokenizer: str | None) -> Part | None:
    """The part of the store that was found which holds these documents already; None where they are new to it.

    Args:
        part: what the documents make; its ``data`` has their fingerprint, its ``selection`` the rule by which rows are
            kept. tokenizer: sha256, None where none was used.

    Raises:
        UserError: the store holds other documents, and the job is not to add any; or it keeps other rows.
    """
    store = found.unfinished or found.finished
    if store is None:
        return None
    where, adds = _where(job, found), job.settings.store.add == "documents"
    known = store.tokenizer.get("sha256")
    if tokenizer is not None and known is not None and tokenizer != known:
        raise StoreError("model.path", f"must have the tokenizer of sha256 {known}, as {where}", tokenizer)
    chosen = _selected(store.parts[0])
    if chosen != _selected(part):
        raise StoreError("tokens", f"must be {chosen}, as {where}", _selected(part))
    same = [old for old in store.parts if old.data.get("sha256") == part.data["sha256"]]
    if not same and not (adds and found.unfinished is None):
        held = ", ".join(str(old.data.get("sha256")) for old in store.parts)
        raise StoreError("data.path", f"must give the documents of sha256 {held}, as {where}", part.data["sha256"])
    if same and same[0].shard_rows != part.shard_rows:
        raise StoreError("store.shard_rows", f"must be {same[0].shard_rows}, as {where}", part.shard_rows)
    by_norm = job.settings.tokens.max_norm is not None  # then the rows follow from states, which the store has had
    if same and part.kept is not None and same[0].tokens.sha256 != part.tokens.sha256 and not by_norm:
        rule = f"must keep the rows that it kept ({same[0].states} of them), as {where}"
        raise StoreError("tokens", rule, f"{part.states} rows, others among them")
    return same[0] if same else None


def _selected(part: Part) -> object:
    """The rule, in words where there is none."""
    if part.kept is None:
        return "all rows"
    return "some rows" if part.selection is None else dict(part.selection)


def new(
    job: Job,
    part: Part,
    model: Mapping[str, Any],
    tokenizer: str | None,
    norm: bytes,
) -> Manifest:
    """A store of one part, which keeps the rows that ``part`` says.

    Args:
        norm: the file with the weight of the final norm.
    """
    settings = job.settings
    empty = Manifest(
        hidden_size=job.architecture.shape.hidden_size,
        compute_dtype=settings.precision.compute,
        stored_dtype=settings.stored_dtype,
        hook_points=(),
        parts=(part,),
        pooling=None if settings.tokens.pool == "none" else settings.tokens.pool,
        final_norm=FileEntry(file=FINAL_NORM_FILE, bytes=len(norm), sha256=hashlib.sha256(norm).hexdigest()),
        model=model,
        tokenizer={"sha256": tokenizer},
    )
    return with_hook_points(job, empty)


def with_hook_points(job: Job, store: Manifest) -> Manifest:
    """A store, and those of the job's hook points that it lacks, over all of the rows that it keeps."""
    layers = job.architecture.shape.num_layers
    held = {entry.point: entry for entry in store.hook_points}
    for point in job.points:
        entry = HookPointEntry.of(
            point,
            num_layers=layers,
            shards=store.grid.shards,
            shape=job.state_shape(point),
            heads=_asked_heads(job) if point.site == ATTN_WEIGHTS else None,
            # of a mean there is none by which the norm could be undone
            divisor=store.pooling not in MEANS and not job.norms_only,
        )
        held.setdefault(point, entry)
    return replace(store, hook_points=tuple(held[point] for point in by_depth(held, layers)))


def with_documents(store: Manifest, part: Part) -> Manifest:
    """A store, and documents at its end."""
    part = replace(part, first_row=store.rows, first_document=store.documents)
    larger = replace(store, parts=(*store.parts, part))
    added = (None,) * (larger.grid.shards - store.grid.shards)
    points = tuple(replace(entry, shards=entry.shards + added) for entry in store.hook_points)
    return replace(larger, hook_points=points)


def _where(job: Job, found: Found) -> str:
    if found.unfinished is None:
        ways = "store.overwrite=true replaces it, store.add=hook_points or store.add=documents adds to it"
        return f"in the store at {job.store_path} ({ways})"
    return f"in the unfinished store at {job.store_path}, {found.begun} (store.overwrite=true starts it again)"


def _asked_heads(job: Job) -> tuple[int, ...] | None:
    """None where all are asked for."""
    return None if len(job.heads) == job.architecture.shape.num_heads else job.heads


def _adapter(model: Mapping[str, Any]) -> str:
    adapter = model.get("adapter")
    return "null" if not isinstance(adapter, Mapping) else f"an adapter of sha256 {adapter.get('sha256')}"


def _heads(heads: Sequence[int] | None) -> object:
    return "all" if heads is None else list(heads)


def _names(points: Iterable[HookPoint]) -> list[str]:
    return [str(point) for point in points]


def _shown(value: object) -> object:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else value
