"""Ranks that watch each other through the store of torch.distributed, over gloo and without NeMo."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore, TCPStore

from nemo_qwen_hidden.errors import RankError
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks
from nemo_qwen_hidden.parallel.peers import watched
from nemo_qwen_hidden.parallel.watch import Limits, Pulse
from tests.parallel.helpers import all_end

ROOT = Path(__file__).parents[2]
PRELOAD = ("torch.distributed",)
LONG_SECS = 120.0
LIMITS = Limits(beat_secs=0.15, silent_secs=1.5, still_secs=1.5)


def act(what: str, pulse: Pulse) -> None:
    """What a rank of two does while it runs."""
    with pulse.running():
        if what == "receives":
            dist.recv(torch.empty(1), 1 - dist.get_rank())
        elif what == "freezes":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "sleeps":
            time.sleep(LONG_SECS)
        elif what == "raises":
            raise ValueError("a sink that cannot")
        elif what == "takes long":
            end = time.monotonic() + 1.5 * LIMITS.still_secs
            while time.monotonic() < end:
                pass
            dist.barrier()


def take_part(rank: Rank, what: Sequence[str], host: int) -> None:
    """Rank ``host`` holds the store. Where it is 2 it is not one of the group, and leaves when they have met."""
    meeting = FileStore(str(rank.rendezvous), 3)
    if rank.rank == host:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting.set("port", str(store.port))
    else:
        store = TCPStore("127.0.0.1", int(meeting.get("port")), is_master=False, wait_for_workers=False)
    if rank.rank == 2:
        meeting.wait(["met"])
        return
    rank.send(os.getpid())
    dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=2)
    try:
        pulse = Pulse()
        with watched(pulse, rank.send, LIMITS):
            dist.barrier()
            meeting.set("met", "")
            act(what[rank.rank], pulse)
            dist.barrier()
    finally:
        dist.destroy_process_group()


class Heard:
    """The process ids of ranks, and what was said."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.words: list[str] = []

    def __call__(self, rank: int, event: int | str) -> None:
        if isinstance(event, str):
            self.words.append(event)
        else:
            self.pids.append(event)


HOST = "rank 0 on this machine, where the store of torch.distributed is,"
HANGS = {
    "still": (("receives", "sleeps"), 0, r"rank 1 has stood still for \d s in act \(test_peers.py:\d+\)"),
    "all wait": (("receives", "receives"), 0, r"all ranks have waited for each other for \d s, rank \d, .*"),
    "frozen host": (("freezes", "receives"), 0, rf"{HOST} has shown no sign of life for \d s"),
    "host gone": (("receives", "receives"), 2, f"{HOST} has gone"),
}


@pytest.mark.distributed
@pytest.mark.parametrize(("what", "host", "said"), HANGS.values(), ids=HANGS)
def test_a_hang_is_said_once_and_ends_all(log: Path, what: tuple[str, str], host: int, said: str) -> None:
    """The starter, which is patient here, sees ranks that end with status 1."""
    heard = Heard()
    with pytest.raises(RankError, match=r"ended without a word \(exit code 1\)|was ended by SIGKILL"):
        run_ranks(take_part, (what, host), world=max(2, host + 1), log=log, on_event=heard)
    assert len(heard.words) == 1 and re.fullmatch(said, heard.words[0])
    assert len(heard.pids) == 2 and all_end(heard.pids)


@pytest.mark.distributed
def test_what_takes_long_is_no_hang(log: Path) -> None:
    heard = Heard()
    assert run_ranks(take_part, (("takes long", "takes long"), 0), world=2, log=log, on_event=heard) == [None, None]
    assert heard.words == []


@pytest.mark.distributed
def test_peers_of_a_sink_that_raises_neither_wait_nor_are_named(log: Path) -> None:
    heard = Heard()
    with pytest.raises(RankError, match="rank 1 failed: ValueError: a sink that cannot"):
        run_ranks(take_part, (("receives", "raises"), 0), world=2, log=log, on_event=heard)
    assert heard.words == [] and all_end(heard.pids)


SCRIPT = """
import os, sys
import torch.distributed as dist
from nemo_qwen_hidden.parallel.peers import watched
from nemo_qwen_hidden.parallel.watch import Pulse
from tests.parallel.test_peers import LIMITS, act
print("pid", os.getpid(), flush=True)
dist.init_process_group("gloo")
pulse, rank = Pulse(), dist.get_rank()
with watched(pulse, lambda text: print("said:", text, flush=True), LIMITS):
    dist.barrier()
    act(sys.argv[1 + rank], pulse)
"""


@contextmanager
def torchrun(script: Path, what: Sequence[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (
        output.open("wb") as file,
        subprocess.Popen([*launcher, str(script), *what], env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


@pytest.mark.distributed
def test_under_torchrun_a_frozen_rank_ends_all(tmp_path: Path) -> None:
    """torchrun itself holds the store, and would give a rank 30 s to end. Two runs side by side: importing torch
    takes most of their time."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    runs = {
        r"rank 0 has shown no sign of life for \d s": ("freezes", "receives"),
        r"rank 1 has shown no sign of life for \d s": ("receives", "freezes"),
    }
    with ExitStack() as stack:
        outputs = {said: tmp_path / f"{number}.log" for number, said in enumerate(runs)}
        processes = [stack.enter_context(torchrun(script, runs[said], outputs[said])) for said in runs]
        assert [process.wait(LONG_SECS) for process in processes] == [1, 1]
    for said, output in outputs.items():
        lines = output.read_text().splitlines()
        (word,) = [line for line in lines if line.startswith("said:")]
        assert re.fullmatch(f"said: {said}", word)
        pids = [int(line.split()[1]) for line in lines if line.startswith("pid ")]
        assert len(pids) == 2 and all_end(pids)
