"""Drops what is damaged in a store, so that an extract job makes that anew and nothing else."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_qwen_hidden.errors import StoreError, raise_all
from nemo_qwen_hidden.store.captured import captured_steps
from nemo_qwen_hidden.store.files import sync_folder
from nemo_qwen_hidden.store.folder import remove
from nemo_qwen_hidden.store.format import MANIFEST, TOKENS, Shard
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.upkeep.checked import BytesReport, no_report
from nemo_qwen_hidden.store.upkeep.verify import Finding, Report, verify
from nemo_qwen_hidden.store.write import place, session

_REPLACED = ("store.path=", "store.add=", "store.overwrite=")


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What ``repair`` did. found: by the verification. shards, files: that are gone. command: what makes them anew, as
    arguments of a process; None where the store does not say how it was made, or where nothing is to be done."""

    found: Report
    shards: tuple[Shard, ...] = ()
    files: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None


def repair(path: str | os.PathLike[str], *, report: BytesReport = no_report) -> Repair:
    """Verifies the store at ``path`` in full and takes away what is damaged, if anything is. It is then an unfinished
    store, which the same extract job finishes: it runs what is missing alone.

    Shards can be dropped, and files that the job makes from its data and its model whatever it runs: the token table
    of the first part, and the final norm. The rest cannot, and then nothing is changed.

    Raises:
        StoreNotFoundError: there is no finished store. StoreError: another job is at work on it or has not ended.
        UserError: something is wrong that cannot be made anew; names each.
    """
    folder = Path(path)
    verify(folder)  # what is no store is left without a trace of a lock
    with place.locked(folder):
        found = verify(folder, full=True, report=report)
        if not found.findings:
            return Repair(found=found)
        if found.unfinished is not None:
            rule = "must be a store that no unfinished job is adding to; extract goes on with it, and it comes first"
            raise StoreError("store", f"{rule} ({found.unfinished})", str(folder))
        manifest = session.find(folder).finished
        assert manifest is not None, "it was verified while it was locked"
        made_anew, steps = _files_made_anew(manifest), any(captured_steps(manifest.parts, str(folder)))
        raise_all([_beyond(folder, finding) for finding in found.findings if steps or not _can_go(finding, made_anew)])
        shards = tuple(_shards(found.findings))
        files = tuple(sorted({finding.file for finding in found.findings if finding.file in made_anew}))
        _drop(folder, manifest, shards, files)
        return Repair(found=found, shards=shards, files=files, command=_command(folder, manifest, shards))


def _drop(folder: Path, manifest: Manifest, shards: Sequence[Shard], files: Iterable[str]) -> None:
    # files before the marker: what is missing is found whatever happens, what is damaged by a full verification alone
    remove(folder / name for name in files)
    for parent in (folder, folder / TOKENS):
        sync_folder(parent)
    session.start(folder, _without(manifest, shards), {}, fresh=False)
    remove([folder / MANIFEST])  # still there where no shard was dropped
    sync_folder(folder)


def _without(manifest: Manifest, shards: Iterable[Shard]) -> Manifest:
    dropped = set(shards)
    points = tuple(
        replace(
            entry,
            shards=tuple(
                None if (entry.point, number) in dropped else shard for number, shard in enumerate(entry.shards)
            ),
        )
        for entry in manifest.hook_points
    )
    return replace(manifest, hook_points=points)


def _shards(findings: Iterable[Finding]) -> Iterator[Shard]:
    """The shards among some findings, each once."""
    found = ((finding.hook_point, finding.shard) for finding in findings)
    yield from dict.fromkeys((point, shard) for point, shard in found if point is not None and shard is not None)


def _files_made_anew(manifest: Manifest) -> set[str]:
    """Files beside the shards that an extract job makes where they are missing. Of a job's data it makes the table
    as that of the first part."""
    norm = set() if manifest.final_norm is None else {manifest.final_norm.file}
    return norm | {file.file for part in manifest.parts[:1] for file in (part.tokens, part.lines)}


def _can_go(finding: Finding, made_anew: set[str]) -> bool:
    return finding.shard is not None or finding.file in made_anew


def _beyond(folder: Path, finding: Finding) -> StoreError:
    """What to say of something that no extract job makes anew."""
    if finding.file == MANIFEST:
        rule = "must be right, since it says what to make anew; the store has to be made again (store.overwrite=true)"
    elif finding.file.startswith(f"{TOKENS}/"):
        rule = "must be right, since of several parts only the first gets its token table anew; take it from a copy"
    else:
        rule = "must be right or be taken away by hand; no job makes it"
    return StoreError(str(folder / finding.file), rule, finding.what)


def _command(folder: Path, manifest: Manifest, shards: Sequence[Shard]) -> tuple[str, ...] | None:
    """The command that made the first part, for what is missing: as it was where it ran all of the store's hook points,
    else for those that lack shards, as hook points to be added."""
    first = manifest.producers[0] if manifest.producers else {}
    command = first.get("command")
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        return None
    points = [str(point) for point in manifest.points]
    replaced: tuple[str, ...] = _REPLACED
    added = [f"store.path={folder.absolute()}"]
    if any(word.startswith("--config") for word in command):
        added.append("store.overwrite=false")  # whatever the file says: it would start the store again
    if first.get("hook_points") != points:
        lacking = {str(point) for point, _ in shards}
        names = ",".join(point for point in points if point in lacking or not lacking)
        added += ["store.add=hook_points", f"capture.hook_points=[{names}]"]
        replaced += ("capture.hook_points=",)
    return (*(word for word in command if not word.startswith(replaced)), *added)
