"""What the ranks run; importable, because the fork server looks it up by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.parallel.launch import Rank
from tests.torture.faults import Watch, install


def work(rank: Rank, watch: Watch, job: Any, begun: Any) -> Any:
    """A rank's part of a job, with its file calls watched."""
    from nemo_qwen_hidden import running
    from nemo_qwen_hidden.parallel.groups import process_groups

    install(replace(watch, role=f"rank{rank.rank}"))
    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        return running.run(job, begun, groups, rank.send)


def make_model(rank: Rank, folder: Path) -> None:
    """A tiny model; here, because the harness itself has no torch."""
    from tests.support.models import Tiny, save_tiny

    save_tiny(folder, Tiny(layers=3, groups=2, tied=True))
