"""The commands that take a store that is there: inspect, verify, repair, merge, export."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from nemo_qwen_hidden.version import __version__

Add = Callable[[str, str, str], argparse.ArgumentParser]
"""Adds a command: its name, what it does in a few words, and what its help ends with."""

DAMAGED = 1
_STORE = "the folder of a store"

_INSPECT = """\
example:
  nemo-qwen-hidden inspect out/demo

In Python: nemo_qwen_hidden.open_store("out/demo")["resid_post@3"][rows]
"""

_VERIFY = """\
Quickly: the manifest's own digest, the presence, size and header of every file,
that shards cover all rows once, and that nothing foreign lies in the folder.
With --full every byte is read: SHA-256 of each file, statistics anew from the
values, NaN and infinite values, token ids, documents and their digests.

examples:
  nemo-qwen-hidden verify out/demo
  nemo-qwen-hidden verify --full out/demo && echo every byte is right

Exit status: 0 nothing is wrong, 1 something is (a line for each), 2 there is no
store, or its manifest cannot be used.
"""

_REPAIR = """\
Verifies every byte, and takes damaged and missing shards out of the store. It
is unfinished then; the extract command that made it, which is shown, runs the
missing rows alone, under any parallel layout, and finishes it. The final norm
and, of the first part, the token table are made anew that way too. Nothing
changes where nothing is wrong, or where something is that cannot be made anew.

example:
  nemo-qwen-hidden repair out/demo
"""

_MERGE = """\
For stores of different documents that one model made alike: the same weights,
tokenizer, dtypes, hook points, windows, and the same choice of rows and pooling
where not all rows are kept. Their documents follow each other in the order
given. Files are linked where the file system can do it, so that both stores
share their bytes on disk, and damage to them; --copy makes it a store of its
own. A merge that was ended is done again by the same command.

example:
  nemo-qwen-hidden merge out/monday out/tuesday --into out/both
"""

_EXPORT = """\
npy: HOOK_POINT.npy [rows, hidden], or with the axes of its states, such as
[rows, heads, head_dim]; token_id.npy, document.npy, position.npy [rows] and
documents.jsonl; numpy.load(FILE, mmap_mode="r") reads them.
parquet: data-00000.parquet and so on, with the columns row, token_id, document,
position, document_id and one for each hook point, lists of its numbers;
datasets.load_dataset("parquet", data_files="FOLDER/*.parquet") reads them.

Values are float16 where the store holds fp16, else float32: numpy has no bf16,
and int8 is written as the numbers that it stands for. Of a store that keeps
some rows alone these are exported, and row.npy says which they are. export.json
says what each hook point is. FOLDER appears when all of it is there.

examples:
  nemo-qwen-hidden export out/demo --to npy --out out/arrays
  nemo-qwen-hidden export out/demo --to parquet --out out/table \\
      --hook-points embed,resid_post@3
"""


def add_commands(add: Add) -> None:
    """Adds the commands to the program's."""
    inspect = add("inspect", "say what is in a store", _INSPECT)
    inspect.add_argument("store", metavar="STORE", help=_STORE)
    inspect.add_argument("--json", action="store_true", help="everything, for programs: JSON on stdout")
    inspect.set_defaults(run=_inspect)

    verify = add("verify", "check that a store is what it says", _VERIFY)
    verify.add_argument("store", metavar="STORE", help=_STORE)
    verify.add_argument("--full", action="store_true", help="read every byte")
    verify.add_argument("--json", action="store_true", help="the findings for programs: JSON on stdout")
    verify.set_defaults(run=_verify)

    repair = add("repair", "drop damaged shards, so that extract makes them anew", _REPAIR)
    repair.add_argument("store", metavar="STORE", help=_STORE)
    repair.set_defaults(run=_repair)

    merge = add("merge", "make one store of several", _MERGE)
    merge.add_argument("stores", nargs="+", metavar="STORE", help="folders of stores, two or more")
    merge.add_argument("--into", required=True, metavar="FOLDER", help="of the new store: a new or empty one")
    merge.add_argument("--copy", action="store_true", help="never link files, always copy them")
    merge.set_defaults(run=_merge)

    export = add("export", "write a store as .npy arrays or Parquet", _EXPORT)
    export.add_argument("store", metavar="STORE", help=_STORE)
    export.add_argument("--to", required=True, choices=("npy", "parquet"), help="the form")
    export.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    export.add_argument("--hook-points", metavar="A,B", help="names with commas between; by default all")
    export.add_argument("--float32", action="store_true", help="float32 also where the store holds fp16")
    export.set_defaults(run=_export)
    for command in (verify, repair, merge, export):
        command.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _inspect(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli import show_store
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.store.fields import to_json
    from nemo_qwen_hidden.store.read.reader import open_store
    from nemo_qwen_hidden.store.upkeep.summary import everything

    store = open_store(parsed.store)
    if parsed.json:
        print(to_json(everything(store)).decode(), end="")
        return 0
    with Terminal() as terminal:
        show_store.store(store, terminal)
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli import show_store
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.store.fields import to_json
    from nemo_qwen_hidden.store.upkeep.verify import verify

    with Terminal(quiet=parsed.quiet) as terminal:
        with terminal.bytes_progress("verifying") as report:
            found = verify(parsed.store, full=parsed.full, report=report)
        if parsed.json:
            print(to_json(found.as_dict()).decode(), end="")
        else:
            show_store.verified(found, terminal)
    return DAMAGED if found.findings else 0


def _repair(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli import show_store
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.store.upkeep.repair import repair

    with Terminal(quiet=parsed.quiet) as terminal:
        with terminal.bytes_progress("verifying") as report:
            done = repair(parsed.store, report=report)
        show_store.repaired(done, terminal)
    return 0


def _merge(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli import show_store
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.store.upkeep.merge import merge

    producer: dict[str, Any] = {
        "versions": {"nemo_qwen_hidden": __version__},
        "command": sys.argv,
        "started_unix_secs": round(time.time(), 3),
    }
    with Terminal(quiet=parsed.quiet) as terminal:
        with terminal.bytes_progress("merging") as report:
            done = merge(parsed.stores, parsed.into, copy=parsed.copy, producer=producer, report=report)
        show_store.merged(done, terminal)
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from nemo_qwen_hidden.cli import show_store
    from nemo_qwen_hidden.cli.terminal import Terminal
    from nemo_qwen_hidden.store.upkeep.export import export

    names = parsed.hook_points and [name.strip() for name in parsed.hook_points.split(",")]
    with Terminal(quiet=parsed.quiet) as terminal:
        with terminal.bytes_progress("exporting") as report:
            done = export(
                parsed.store,
                parsed.out,
                to=parsed.to,
                hook_points=names,
                float32=parsed.float32,
                report=report,
            )
        show_store.exported(done, parsed.to, terminal)
    return 0
