"""``profile.trace``: one file of all ranks, whose spans say what happened, and a run that is the same with it."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden import extract, running
from nemo_qwen_hidden.config import (
    CaptureSettings,
    DataSettings,
    ModelSettings,
    ParallelSettings,
    ProfileSettings,
    RuntimeSettings,
    Settings,
    StoreSettings,
)
from nemo_qwen_hidden.errors import RankError
from nemo_qwen_hidden.job import prepare
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.progress import Progress
from nemo_qwen_hidden.running import Begun, RankResult
from nemo_qwen_hidden.store.read.tokens import TokenTable
from nemo_qwen_hidden.trace.shares import shares
from tests.conftest import Start
from tests.support.models import TINY, Tiny, write_documents
from tests.support.ranks import stored

LAYOUTS: list[dict[str, Any]] = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"pp": 2, "vp": 2}]
Event = dict[str, Any]


@pytest.fixture
def settings(tiny_folders: dict[Tiny, Path], tmp_path: Path) -> Settings:
    data = write_documents(tmp_path / "documents.jsonl", (31, 1, 50, 17, 23, 2, 40, 12))
    return Settings(
        model=ModelSettings(path=str(tiny_folders[TINY[0]])),
        capture=CaptureSettings(hook_points=("embed", "resid_post@1", "z@3", "final_norm")),
        data=DataSettings(path=str(data), max_tokens=50, batch_tokens=60),
        store=StoreSettings(path=str(tmp_path / "traced"), shard_rows=33, commit_secs=0),
        runtime=RuntimeSettings(threads=1),
        profile=ProfileSettings(trace=str(tmp_path / "new" / "trace.json")),
    )


def run(settings: Settings, start_ranks: Start, target: Any = stored) -> tuple[dict[str, bytes], int]:
    """The bytes of the shards, and how many microbatches there were."""
    job = prepare(settings, world=None, for_store=True)
    with extract.locked(job):
        begun = extract.begin(job)
        results = start_ranks(job.topology.world, target, job, begun)
        table = TokenTable(job.store_path, begun.manifest.parts)
        microbatches = sum(1 for _ in running._microbatches(job, begun, table))
        extract.finish(job, begun, results)
    files = sorted(job.store_path.rglob("*.safetensors"))
    return {str(file.relative_to(job.store_path)): file.read_bytes() for file in files}, microbatches


def read(settings: Settings) -> list[Event]:
    assert settings.profile.trace is not None
    events: list[Event] = json.loads(Path(settings.profile.trace).read_text())["traceEvents"]
    return events


def assert_nested(spans: list[Event]) -> None:
    """Two spans of a thread lie apart, or one within the other. Times are microseconds, to the nanosecond."""
    around: list[int] = []
    ends = [(round(1000 * each["ts"]), round(1000 * (each["ts"] + each["dur"]))) for each in spans]
    for start, stop in sorted(ends, key=lambda span: (span[0], -span[1])):
        while around and around[-1] <= start:
            around.pop()
        assert not around or stop <= around[-1]
        around.append(stop)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_forward_is_there_once_and_the_store_is_the_same(
    layout: dict[str, Any], settings: Settings, start_ranks: Start, tmp_path: Path
) -> None:
    asked = replace(settings, parallel=ParallelSettings(**layout))
    made, microbatches = run(asked, start_ranks)
    elsewhere = replace(asked.store, path=str(tmp_path / "untraced"))
    before = set(tmp_path.iterdir())
    assert run(replace(asked, store=elsewhere, profile=ProfileSettings()), start_ranks)[0] == made
    assert set(tmp_path.iterdir()) - before == {tmp_path / "untraced"}

    events, job = read(asked), prepare(asked, world=None, for_store=False)
    topology = job.topology
    spans = [event for event in events if event["ph"] == "X"]
    forwards = Counter(
        (event["pid"], event["args"]["microbatch"], event["args"]["stage"])
        for event in spans
        if event["name"] == "forward"
    )
    assert forwards == {
        (rank, microbatch, stage): 1
        for rank in range(topology.world)
        for microbatch in range(microbatches)
        for stage in topology.at(rank).stages
        if microbatch % topology.dp == topology.at(rank).dp
    }
    threads = {(event["pid"], event["tid"]) for event in spans}
    for thread in threads:
        assert_nested([event for event in spans if (event["pid"], event["tid"]) == thread])
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert threads <= named
    labels = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    axis = next(iter(layout))
    assert labels == {rank: f"rank {rank}: {axis}={rank}" for rank in (0, 1)}
    assert {event["name"] for event in spans} == {
        *("loading weights", "running", "forward", "tap", "exchange", "encode", "write", "sync", "journal"),
        *("wait for disk", "wait for all", "seal"),
        # a pipeline stage fills its shards alone, and seals them while it writes; others are left to the end
        *(["receive", "send"] if topology.pp > 1 else ["sealing"]),
    }


def test_what_is_written_is_what_was_made(settings: Settings, start_ranks: Start) -> None:
    asked = replace(settings, parallel=ParallelSettings(pp=2))
    run(asked, start_ranks)
    events = read(asked)
    rows, widths = 176, 64 * 4  # of embed, resid_post and final_norm; z has as many numbers
    written = sum(event["args"]["bytes"] for event in events if event["name"] == "write")
    assert written == 4 * rows * widths
    for rank in (0, 1):
        queued = [event for event in events if event["ph"] == "C" and event["pid"] == rank]
        values = [event["args"]["queued bytes"] for event in sorted(queued, key=lambda event: event["ts"])]
        assert values[-1] == 0 and all(first != second for first, second in pairwise(values))


def test_a_receive_ends_after_its_send_began(settings: Settings, start_ranks: Start) -> None:
    """Ranks are on one clock: what the second stage computes comes after the first stage's forward."""
    asked = replace(settings, parallel=ParallelSettings(pp=2))
    _, microbatches = run(asked, start_ranks)
    forwards = {
        (event["pid"], event["args"]["microbatch"]): event for event in read(asked) if event["name"] == "forward"
    }
    for index in range(microbatches):
        first, second = forwards[0, index], forwards[1, index]
        assert first["ts"] + first["dur"] <= second["ts"]


def test_shares(settings: Settings, start_ranks: Start) -> None:
    asked = replace(settings, parallel=ParallelSettings(pp=2, dp=2))
    _, microbatches = run(asked, start_ranks)
    found = shares(Path(str(asked.profile.trace)))
    assert [each.label for each in found] == [
        "rank 0: pp=0 dp=0", "rank 1: pp=0 dp=1", "rank 2: pp=1 dp=0", "rank 3: pp=1 dp=1",
    ]  # fmt: skip
    for each in found:
        assert sum(each.shares.values()) == pytest.approx(1)
        assert all(0 <= share < 1 for share in each.shares.values())
        assert each.shares["compute"] > 0
    assert sum(each.microbatches for each in found) == 2 * microbatches


def test_gathering_on_rank_0(settings: Settings, start_ranks: Start) -> None:
    asked = replace(settings, parallel=ParallelSettings(pp=2), capture=replace(settings.capture, gather="rank0"))
    _, microbatches = run(asked, start_ranks)
    events = read(asked)
    assert {event["pid"] for event in events if event["name"] == "gather"} == {0, 1}
    assert {event["pid"] for event in events if event["name"] == "write"} == {0}
    assert sum(event["name"] == "forward" for event in events) == 2 * microbatches


def killed(rank: Rank, job: Any, begun: Begun) -> RankResult:
    """Rank 1 ends by SIGKILL after its first microbatch."""
    from nemo_qwen_hidden.parallel.groups import process_groups

    def die(event: object) -> None:
        if rank.rank == 1 and isinstance(event, Progress):
            os.kill(os.getpid(), signal.SIGKILL)

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        return running.run(job, begun, groups, die, rank.pulse)


def test_a_killed_run_leaves_no_trace(settings: Settings, start_ranks: Start) -> None:
    """Nor that of an earlier run, which would be taken for it."""
    asked = replace(settings, parallel=ParallelSettings(dp=2))
    path = Path(str(asked.profile.trace))
    path.parent.mkdir()
    path.write_text("an earlier one")
    with pytest.raises(RankError, match="SIGKILL"):
        run(asked, start_ranks, killed)
    assert list(path.parent.iterdir()) == []
    run(asked, start_ranks)  # goes on
    assert shares(path)
