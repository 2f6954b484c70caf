"""What is tortured: a tiny model, a tiny corpus, and the jobs over them in several layouts."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.config import (
    CaptureSettings,
    DataSettings,
    ModelSettings,
    ParallelSettings,
    PrecisionSettings,
    RuntimeSettings,
    Settings,
    StoreSettings,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2+sp": {"tp": 2, "sp": True},
}
JOBS = ("new", "hook_points", "documents")
"""A new store; hook points added to it; documents added to that. A job that adds begins with the store before it."""
FIRST_POINTS = ("embed", "resid_post@0", "resid_post@-1")
ALL_POINTS = (*FIRST_POINTS, "final_norm")
DOCUMENTS = {"first": (3, 0, 31, 1, 57, 17, 23, 2, 44, 40, 12, 9, 26, 5, 38), "second": (21, 34, 0, 7, 29)}
VOCAB = 383


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a job is run: what may differ between a job and the one that resumes it."""

    layout: str = "tp1"
    gather: str = "none"
    batch_tokens: int = 60
    packing: bool = True

    def __str__(self) -> str:
        packed = "" if self.packing else " padded"
        return f"{self.layout}{' rank0' if self.gather == 'rank0' else ''} {self.batch_tokens}{packed}"


def any_way(chance: random.Random) -> Way:
    return Way(
        layout=chance.choice(list(LAYOUTS)),
        gather=chance.choice(["none", "none", "rank0"]),
        batch_tokens=chance.choice([20, 60, 110]),
        packing=chance.random() < 0.7,
    )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """folder: of model and corpus."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def write_corpus(self) -> None:
        for name, lengths in DOCUMENTS.items():
            chance = random.Random(name)
            with open(self.folder / f"{name}.jsonl", "w") as file:
                for length in lengths:
                    file.write(json.dumps({"token_ids": [chance.randrange(VOCAB) for _ in range(length)]}) + "\n")

    def settings(self, job: str, store: Path, way: Way, *, stored: str, commit_secs: float = 0.0) -> Settings:
        """One command: what does job ``job`` on ``store``."""
        documents = "second" if job == "documents" else "first"
        return Settings(
            model=ModelSettings(path=str(self.model)),
            parallel=ParallelSettings(**LAYOUTS[way.layout]),
            capture=CaptureSettings(hook_points=FIRST_POINTS if job == "new" else ALL_POINTS, gather=way.gather),
            precision=PrecisionSettings(stored=stored),
            data=DataSettings(
                path=str(self.folder / f"{documents}.jsonl"),
                max_tokens=50,
                batch_tokens=way.batch_tokens,
                packing=way.packing,
            ),
            store=StoreSettings(
                path=str(store), shard_rows=23, add=None if job == "new" else job, commit_secs=commit_secs
            ),
            runtime=RuntimeSettings(threads=1),
        )
