"""Whether a store is what its manifest says: quickly by names, sizes and headers, or in full by every byte.

docs/format.md lists what is checked, and what no file can contradict.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, RESIDUAL_SITES, SITES, HookPoint, by_depth
from nemo_qwen_hidden.plan.footprint import DecoderShape
from nemo_qwen_hidden.plan.shapes import state_shape
from nemo_qwen_hidden.store.entries import FileEntry, HookPointEntry, ShardEntry
from nemo_qwen_hidden.store.files import read_inside
from nemo_qwen_hidden.store.folder import survey
from nemo_qwen_hidden.store.format import FINAL_NORM_FILE, MANIFEST, MARKER
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.upkeep.check_shards import shard_problems
from nemo_qwen_hidden.store.upkeep.check_tokens import TableCheck, architecture_of, norm_problems
from nemo_qwen_hidden.store.upkeep.checked import (
    BytesReport,
    CheckedFile,
    Meter,
    checked_file,
    no_report,
    short,
    words_of,
)
from nemo_qwen_hidden.store.upkeep.foreign import strangers
from nemo_qwen_hidden.store.write import session

_MOST_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong. file: its path in the store. what: in words, ``must ..., but is ...``. hook_point,
    shard, rows: what the file holds, where it is a shard; rows are counted as its states are."""

    file: str
    what: str
    hook_point: HookPoint | None = None
    shard: int | None = None
    rows: range | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values; rows as the first and the one after the last."""
        rows = None if self.rows is None else [self.rows.start, self.rows.stop]
        point = None if self.hook_point is None else str(self.hook_point)
        return {"file": self.file, "hook_point": point, "shard": self.shard, "rows": rows, "what": self.what}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``verify`` found. full: every byte was read. files, bytes: that the manifest lists. unfinished: what a job
    that has not ended is making of the store, in words. findings: in the order of the manifest."""

    path: Path
    full: bool
    files: int
    bytes: int
    unfinished: str | None
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "path": str(self.path), "findings": [finding.as_dict() for finding in self.findings]}


def verify(path: str | os.PathLike[str], *, full: bool = False, report: BytesReport = no_report) -> Report:
    """Checks the finished store at ``path``; changes nothing.

    Args:
        full: read every byte, and recompute all that follows from others; else names, sizes and headers alone.
        report: called with the bytes that are done, and all there are.

    Raises:
        StoreNotFoundError: there is no finished store. StoreError: its manifest is not what it should be, or a folder
        cannot be read.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    files = list(manifest.files())
    total = sum(file.bytes for file in files)
    unfinished, job, wrong = _unfinished(folder)
    checks = _Checks(folder, manifest, Meter(report, total), full=full)
    found = [*wrong, *_label_findings(manifest), *_foreign(folder, manifest, job), *_run(checks.all())]
    return Report(
        path=folder, full=full, files=len(files) + 1, bytes=total, unfinished=unfinished, findings=tuple(found)
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the finished store in ``folder``.

    Raises:
        StoreNotFoundError: there is none. StoreError: it is not what it should be.
    """
    if not os.path.lexists(folder / MANIFEST):
        rule = f"must be the folder of a finished store, with a {MANIFEST}"
        if folder.is_dir() and (contents := survey(folder)).marker is not None:
            rule = f"must be a finished store; this one is still being made, or was left unfinished ({contents.begun})"
        raise StoreNotFoundError("store", rule, str(folder))
    return Manifest.from_json(read_inside(folder, MANIFEST), str(folder / MANIFEST))


def unfinished_job(folder: Path) -> str | None:
    """What a job that has not ended is making of the store in ``folder``, in words."""
    return _unfinished(folder)[0]


def _unfinished(folder: Path) -> tuple[str | None, session.Found | None, list[Finding]]:
    """What a job that has not ended is making, in words and as it was found, and what is wrong with its marker."""
    if not os.path.lexists(folder / MARKER):
        return None, None, []
    try:
        found = session.find(folder)
    except StoreError as error:
        return None, None, [Finding(file=MARKER, what=words_of(error, str(folder / MARKER)))]
    target = found.unfinished
    if target is None:
        return None, None, [Finding(file=MARKER, what="must say what an unfinished job is making")]
    if found.grows:
        return f"{found.begun}: a training run adds steps to {len(target.parts):,}", found, []
    lacking = sum(1 for _ in target.missing())
    words = f"{found.begun}: a store of {target.rows:,} rows at {len(target.points)} hook points"
    return f"{words}, of which {lacking} shards were to be made", found, []


def _foreign(folder: Path, manifest: Manifest, job: session.Found | None) -> Iterator[Finding]:
    target, grows = (None, False) if job is None else (job.unfinished, job.grows)
    for name, what in strangers(folder, manifest, target, grows=grows):
        yield Finding(file=name, what=what)


def _label_findings(manifest: Manifest) -> Iterator[Finding]:
    """Labels that follow from others."""
    for what in _label_problems(manifest):
        yield Finding(file=MANIFEST, what=short(what))


def _label_problems(manifest: Manifest) -> Iterator[str]:
    known = architecture_of(manifest)
    size, layers = known.get("hidden_size", manifest.hidden_size), known.get("num_layers")
    if size != manifest.hidden_size:
        yield f"hidden_size must be {size}, the model's, but is {manifest.hidden_size}"
    if manifest.final_norm is not None and manifest.final_norm.file != FINAL_NORM_FILE:
        yield f"final_norm.file must be {FINAL_NORM_FILE}, but is {manifest.final_norm.file!r}"
    ours = all(point.site in SITES for point in manifest.points)
    if type(layers) is not int or not ours:  # sites of a later release are left alone
        return
    if manifest.points != by_depth(manifest.points, layers):
        yield f"hook_points must be in order of depth, but are {[str(point) for point in manifest.points]}"
    for entry in manifest.hook_points:
        point = entry.point
        if point.layer is not None and point.layer >= layers:
            yield f"{point} must be at one of the model's {layers} layers"
            continue
        yield from _shape_problems(entry, manifest.hidden_size, known)
        labels = {"meaning": point.meaning(layers), "huggingface_index": point.huggingface_index(layers)}
        for label, value in labels.items():
            if getattr(entry, label) != value:
                yield f"{label} of {point} must be {value!r}, but is {getattr(entry, label)!r}"


def _shape_problems(entry: HookPointEntry, hidden_size: int, known: Mapping[str, Any]) -> Iterator[str]:
    """Against the model's sizes, where the manifest says them."""
    point, shape = entry.point, entry.shape
    if entry.heads is not None and point.site != ATTN_WEIGHTS:
        yield f"heads must be of {ATTN_WEIGHTS} alone, but are of {point}"
    if point.site in RESIDUAL_SITES:
        expected: tuple[int, ...] = (hidden_size,)
    elif all(type(known.get(field.name)) is int for field in fields(DecoderShape)):
        decoder = DecoderShape(**{field.name: known[field.name] for field in fields(DecoderShape)})
        expected = state_shape(point, decoder, keys=shape[-1], heads=entry.heads)
    else:
        return
    if shape != expected:
        yield f"shape of {point} must be {list(expected)}, but is {list(shape)}"


class _Checks:
    """The files of a store, each a check of its own."""

    def __init__(self, folder: Path, manifest: Manifest, meter: Meter, *, full: bool) -> None:
        self._folder, self._manifest, self._meter, self._full = folder, manifest, meter, full

    def all(self) -> Iterator[Callable[[], list[Finding]]]:
        """Every check, in the order of the manifest."""
        yield self._norm
        yield from (partial(self._table, number) for number in range(len(self._manifest.parts)))
        for point, entry in enumerate(self._manifest.hook_points):
            yield from (partial(self._shard, point, shard) for shard in range(len(entry.shards)))

    def _norm(self) -> list[Finding]:
        entry = self._manifest.final_norm
        if entry is None:
            return []
        wrong = self._problems(entry, lambda file: norm_problems(file, self._manifest, full=self._full))
        return [Finding(file=entry.file, what=what) for what in wrong]

    def _table(self, number: int) -> list[Finding]:
        """Of both files of a token table; the second is held against the first where that one is right."""
        part, check = self._manifest.parts[number], TableCheck(self._manifest, number)
        wrong = self._problems(part.tokens, partial(check.table_problems, full=self._full))
        in_lines = self._problems(part.lines, partial(self._problems_of_lines, check, None if wrong else part.tokens))
        found = [Finding(file=part.tokens.file, what=what) for what in wrong]
        return found + [Finding(file=part.lines.file, what=what) for what in in_lines]

    def _problems_of_lines(self, check: TableCheck, table: FileEntry | None, lines: CheckedFile) -> Iterator[str]:
        with ExitStack() as stack:
            silent = Meter(no_report, 0)  # its bytes have been counted
            opened = None if table is None else stack.enter_context(checked_file(self._folder, table, silent))
            yield from check.lines_problems(lines, opened, full=self._full)

    def _shard(self, point: int, shard: int) -> list[Finding]:
        entry = self._manifest.hook_points[point]
        listed = entry.shards[shard]
        assert listed is not None, "a manifest that from_json has passed lists every shard"
        wrong = self._problems(listed, lambda file: shard_problems(file, self._manifest, point, shard, full=self._full))
        rows = range(listed.first_row, listed.first_row + listed.rows)
        return [Finding(file=listed.file, what=what, hook_point=entry.point, shard=shard, rows=rows) for what in wrong]

    def _problems(self, entry: FileEntry | ShardEntry, check: Callable[[CheckedFile], Iterable[str]]) -> list[str]:
        """What ``check`` says of a file, in words, or why it cannot be read."""
        found: list[str] = []
        try:
            with checked_file(self._folder, entry, self._meter) as file:
                found.extend(check(file))
        except StoreError as error:
            found.append(words_of(error, str(self._folder / entry.file)))
        return list(map(short, found))


def _run(checks: Iterable[Callable[[], list[Finding]]]) -> Iterator[Finding]:
    """The findings of all checks, in order; they run in threads, where numpy and hashlib let each other work."""
    pool = ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    try:
        for future in [pool.submit(check) for check in checks]:
            yield from future.result()
    finally:
        pool.shutdown(cancel_futures=True)
