"""What a store says of how it was made: the manifest of a job."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from nemo_qwen_hidden import __version__
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.store.entries import HookPointEntry, TokenPart
from nemo_qwen_hidden.store.manifest import Manifest

PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "transformers", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What ``begin`` has put into the folder. windowed: documents longer than one window of ``data.max_tokens``."""

    tokens: TokenPart
    windowed: int
    data_fingerprint: str
    tokenizer_fingerprint: str | None
    started: float


def manifest_of(job: Job, begun: Begun, run_seconds: float) -> Manifest:
    """The manifest of a finished job, but for the shards, which ``session.finish`` adds. run_seconds: computing and
    writing, without start-up."""
    settings, layers = job.settings, job.architecture.shape.num_layers
    return Manifest(
        rows=begun.tokens.rows,
        documents=begun.tokens.documents,
        hidden_size=job.architecture.shape.hidden_size,
        shard_rows=settings.store.shard_rows,
        compute_dtype=settings.precision.compute,
        stored_dtype=settings.stored_dtype,
        hook_points=tuple(HookPointEntry.of(point, num_layers=layers) for point in job.points),
        tokens=(begun.tokens,),
        model={"path": settings.model.path or "embedded demo model", "config": dict(job.architecture.config)},
        tokenizer={"sha256": begun.tokenizer_fingerprint},
        data={
            "path": settings.data.path or "embedded text",
            "sha256": begun.data_fingerprint,
            "max_tokens": job.batching.max_tokens,
            "documents_cut_into_windows": begun.windowed,
        },
        producer={
            "layout": {"tp": job.topology.tp, "pp": job.topology.pp, "dp": job.topology.dp, "sp": job.topology.sp},
            "batch_tokens": settings.data.batch_tokens,
            "packing": settings.data.packing,
            "gather": settings.capture.gather,
            "versions": {"nemo_qwen_hidden": __version__, **dict(_versions())},
            "command": sys.argv,
            "started_unix_secs": round(begun.started, 3),
            "run_secs": round(run_seconds, 3),
        },
    )


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "unknown"
