"""This package's ``extract``: the main job itself, in its own ranks, into a real store.

Seconds are those of a run's summary, from the loaded model to shards that are written, synced, read back, hashed and
named, and on top of them the manifest.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.rivals.rival import Contestant, Found
from benchmarks.work import Case, Work
from nemo_qwen_hidden import extract, open_store, running
from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.config import ModelSettings
from nemo_qwen_hidden.job import Job, prepare
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks


class Extract(Contestant):
    """One run for each call: its ranks load the model anew, before the time that counts begins."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.settings = compose([f"precision={work.dtype}", *work.settings])

    def run(self, case: Case, documents: Sequence[int], folder: Path) -> float:
        folder.mkdir()
        corpus = folder / "corpus.jsonl"
        records = (json.dumps({"id": str(n), "token_ids": self.work.documents[n]}) + "\n" for n in documents)
        corpus.write_text("".join(records), encoding="utf-8")
        asked = replace(
            self.settings,
            model=ModelSettings(path=str(self.work.model)),
            capture=replace(self.settings.capture, hook_points=tuple(map(str, case.points))),
            tokens=replace(self.settings.tokens, keep="last" if case.last else "all"),
            data=replace(self.settings.data, path=str(corpus)),
            store=replace(self.settings.store, path=str(folder / "store")),
        )
        job = prepare(asked, world=None, for_store=True)
        with extract.locked(job):
            begun = extract.begin(job)
            results = run_ranks(_part, (job, begun), world=job.topology.world, log=folder / "log")
            start = time.perf_counter()
            summary = extract.finish(job, begun, results)
            finishing = time.perf_counter() - start
        return summary.run_seconds + finishing

    def read(self, case: Case, documents: Sequence[int], folder: Path) -> Found:
        store = open_store(folder / "store")
        for point in case.points:
            first = 0
            for document in documents:
                count = len(case.tokens_of(len(self.work.documents[document])))
                yield document, point, store[point][first : first + count]
                first += count


def _part(rank: Rank, job: Job, begun: running.Begun) -> running.RankResult:
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        return running.run(job, begun, groups, rank.send, rank.pulse)
