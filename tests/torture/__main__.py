"""``python -m tests.torture --kills 100 --seed 1 [--layouts tp2,pp2,dp2] [--folder F]``."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.claims import Broken
from tests.torture.coordinator import Hang
from tests.torture.harness import Torture
from tests.torture.scene import LAYOUTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", default="tp2,pp2,dp2", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "torture")
    asked = parser.parse_args()
    folder = (asked.folder / f"seed-{asked.seed}").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    torture = Torture(folder, seed=asked.seed, layouts=tuple(asked.layouts.split(",")), say=_say)
    started = time.monotonic()
    try:
        torture.prepare()
        torture.run(asked.kills)
    except (Broken, Hang) as broken:
        _say(f"\nBROKEN: {broken}")
        _say(f"again: python -m tests.torture --seed {asked.seed} --kills {asked.kills} --layouts {asked.layouts}")
        _say(f"what is left: {folder}")
        return 1
    secs = time.monotonic() - started
    for name, count in (*sorted(torture.tally.kills.items()), *sorted(torture.tally.checks.items())):
        _say(f"{count:6}  {name}")
    _say(f"{torture.tally.kills.total():6}  kills in {secs:.0f} s, no promise broken")
    shutil.rmtree(folder)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
