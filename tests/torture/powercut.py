"""What a disk may hold after the power failed: durable is only what was synced after it was done.

Contents: each sector of a range that was written and not synced since is the new one, the old one, or, where there was
nothing before, garbage. Names: of what was done in a folder since it was synced last, only the first steps happened
(how many, is chance), or, on a worse file system, any of them; syncing a file does not make its name durable.
"""

import base64
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.torture.faults import FAILED, Watch

SECTOR_BYTES = 512


@dataclass
class _Write:
    """Of a file: at ``offset``, what was there before. ``done``: number of the line at which it had ended."""

    inode: int
    offset: int
    length: int
    old: bytes
    done: int
    truncated: bool = False


@dataclass
class _Step:
    """Of a folder: what was done to its names."""

    folder: str
    kind: str
    fields: list[Any]
    started: int
    done: int


@dataclass
class _History:
    writes: list[_Write] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)
    opened: list[tuple[str, int, int]] = field(default_factory=list)  # path, inode, line
    synced: dict[str, int] = field(default_factory=dict)  # inode or folder: line at which the last whole sync began


def cut_power(watch: Watch, chance: random.Random) -> list[str]:
    """Changes the store, of which nobody has a file open, to what might be left of it; says what was done."""
    history = _read(watch)
    said = _undo_names(history, chance)
    said += _spoil_contents(history, watch.store, chance)
    forget(watch)
    return said


def forget(watch: Watch) -> None:
    """From here on everything that is there counts as durable."""
    watch.log.write_text("")
    shutil.rmtree(watch.kept, ignore_errors=True)
    watch.kept.mkdir(parents=True)


def events(watch: Watch) -> list[list[Any]]:
    """The lines of the log that a dying process has left whole."""
    found = []
    for line in watch.log.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _read(watch: Watch) -> _History:
    lines, history = events(watch), _History()
    ends = {event[1]: at for at, event in enumerate(lines) if event[0].isupper()}
    failed = {event[1] for event in lines if event[0] == FAILED}
    for at, event in enumerate(lines):
        kind = event[0]
        if not kind.islower() or event[1] in failed:
            continue
        if kind == "o" and len(event) == 3:
            history.opened.append((event[1], event[2], at))
            continue
        # a call in which its process died ends there: if it did anything, a later sync has it too
        done, fields = ends.get(event[1], at), event[4:]
        if kind == "w":
            inode, offset, length, old = fields
            history.writes.append(_Write(inode, offset, length, base64.b64decode(old), done))
        elif kind == "t":
            inode, length, before = fields
            if length > before:
                history.writes.append(_Write(inode, before, length - before, b"", done, truncated=True))
        elif kind == "f":
            if event[1] in ends:
                for key in (str(fields[0]), fields[1]):
                    history.synced[key] = at
        elif kind in "rucmd":
            path = fields[1] if kind == "r" else fields[0]
            history.steps.append(_Step(os.path.dirname(path), kind, fields, at, done))
    return history


def _undo_names(history: _History, chance: random.Random) -> list[str]:
    waiting: dict[str, list[_Step]] = {}
    for step in history.steps:
        if step.done >= history.synced.get(step.folder, -1):
            waiting.setdefault(step.folder, []).append(step)
    undone: list[_Step] = []
    for steps in waiting.values():
        if chance.random() < 0.3:
            undone += [step for step in steps if chance.random() < 0.5]
            continue
        kept = chance.choice([0, len(steps), chance.randint(0, len(steps))])
        undone += steps[kept:]
    # What was done in a folder that was durably removed afterwards cannot be undone in a later one of the same name.
    removed = {step.fields[0]: step.started for step in history.steps if step.kind == "d" and step not in undone}
    said = []
    for step in sorted(undone, key=lambda step: step.started, reverse=True):
        if step.started > removed.get(step.folder, -1) and _undo(step):
            said.append(f"undid {step.kind} {' '.join(map(str, step.fields[:2]))}")
    return said


def _undo(step: _Step) -> bool:
    if not os.path.isdir(step.folder):
        return False
    if step.kind == "r":
        source, target, inode, kept = step.fields
        if not os.path.lexists(target) or os.lstat(target).st_ino != inode:
            return False
        if os.path.isdir(os.path.dirname(source)):
            os.rename(target, source)
        else:
            os.unlink(target)
        if kept is not None:
            os.link(kept, target)
    elif step.kind == "u":
        path, _, kept = step.fields
        if os.path.lexists(path) or not os.path.exists(kept):
            return False
        os.link(kept, path)
    elif step.kind == "c":
        if not os.path.isfile(step.fields[0]):
            return False
        os.unlink(step.fields[0])
    elif step.kind == "m":
        if not os.path.isdir(step.fields[0]):
            return False
        shutil.rmtree(step.fields[0])
    elif step.kind == "d":
        if os.path.lexists(step.fields[0]):
            return False
        os.mkdir(step.fields[0])
    return True


def _spoil_contents(history: _History, store: Path, chance: random.Random) -> list[str]:
    paths = {path.lstat().st_ino: path for path in store.rglob("*") if path.is_file()}
    said = []
    for write in reversed(history.writes):
        path = paths.get(write.inode)
        if path is None or write.done < history.synced.get(str(write.inode), -1):
            continue
        spoilt = _spoil_size(path, write, chance) if write.truncated else _spoil(path, write, chance)
        if spoilt:
            said.append(f"{spoilt} {path.relative_to(store)} at {write.offset} + {write.length}")
    for name, inode, at in history.opened:
        if inode in paths and at >= history.synced.get(str(inode), -1):
            path = paths[inode]
            size = path.stat().st_size
            path.write_bytes(chance.randbytes(chance.randint(0, size)))
            said.append(f"scribbled over {name}")
    return said


def _spoil_size(path: Path, write: _Write, chance: random.Random) -> str:
    if path.stat().st_size <= write.offset or chance.random() < 0.5:
        return ""
    os.truncate(path, write.offset)
    return "cut"


def _spoil(path: Path, write: _Write, chance: random.Random) -> str:
    """Leaves, takes back or scribbles over each sector of what was written; a file that grew may end anywhere."""
    mood, how = chance.choice(["leave", "lose", "mix", "mix"]), set()
    if mood == "leave":
        return ""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        place = write.offset
        while place < write.offset + write.length:
            stop = min((place // SECTOR_BYTES + 1) * SECTOR_BYTES, write.offset + write.length)
            old = write.old[place - write.offset : stop - write.offset].ljust(stop - place, b"\0")
            fate = "lost" if mood == "lose" else chance.choice(["kept", "lost", "scribbled"])
            if fate == "scribbled" and any(old):
                fate = "lost"  # a disk does not invent bytes where others were
            if fate != "kept" and place < size:
                file.seek(place)
                file.write((old if fate == "lost" else chance.randbytes(stop - place))[: size - place])
                how.add(fate)
            place = stop
        end = write.offset + len(write.old)
        if write.offset + write.length >= size > end and chance.random() < 0.5:
            file.truncate(chance.randint(end, size))
            how.add("cut")
    return "+".join(sorted(how))
