"""Storing sends nothing: measured at the sockets, not by what the code means to send."""

from pathlib import Path

import pytest

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.config import (
    CaptureSettings,
    DataSettings,
    ModelSettings,
    ParallelSettings,
    RuntimeSettings,
    Settings,
    StoreSettings,
)
from nemo_qwen_hidden.job import prepare
from tests.conftest import Start
from tests.support.models import TINY, Tiny, write_documents
from tests.support.wire import sent_by_a_run

LENGTHS = (90, 77, 64, 100, 31, 57, 120, 88, 90, 101) * 3
CONTROL_BYTES = 32768  # of barriers, and of what ranks tell each other about the job


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"dp": 2}], ids=str)
def test_storing_sends_no_states(
    layout: dict[str, int], tiny_folders: dict[Tiny, Path], tmp_path: Path, start_ranks: Start
) -> None:
    sent = {}
    for how in ("thrown away", "stored", "rank0"):
        settings = Settings(
            model=ModelSettings(path=str(tiny_folders[TINY[0]])),
            capture=CaptureSettings(gather="rank0" if how == "rank0" else "none"),
            parallel=ParallelSettings(**layout),
            data=DataSettings(path=str(write_documents(tmp_path / "documents.jsonl", LENGTHS)), batch_tokens=300),
            store=StoreSettings(path=str(tmp_path / how), shard_rows=500),
            runtime=RuntimeSettings(threads=1),
        )
        job = prepare(settings, world=None, for_store=True)
        with extract.locked(job):
            begun = extract.begin(job)
            sent[how] = sum(start_ranks(job.topology.world, sent_by_a_run, job, begun, how != "thrown away"))
    states = sum(LENGTHS) * 64 * 4 * 5
    assert states > 50 * CONTROL_BYTES
    assert sent["stored"] - sent["thrown away"] < CONTROL_BYTES, sent
    assert sent["rank0"] - sent["thrown away"] > states / 3, sent  # the measure does see states on their way
