"""What a store says of how it was made: the model, and a record of each job that worked on it."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_qwen_hidden.checkpoint.adapter import Adapter
from nemo_qwen_hidden.checkpoint.fingerprint import final_norm_weight, weights_sha256
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.store.norm_file import norm_file
from nemo_qwen_hidden.topology import AXES, Topology
from nemo_qwen_hidden.version import __version__

PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "transformers", "safetensors")


def model_of(job: Job) -> dict[str, Any]:
    """The manifest's ``model``. Reads all weights, and the adapter's."""
    architecture = job.architecture
    found: dict[str, Any] = {
        "path": job.settings.model.path or "embedded demo model",
        "weights_sha256": weights_sha256(open_weights(job.model_folder, job.architecture)),
        "architecture": {
            **vars(architecture.shape),
            "rotary_base": architecture.rotary_base,
            "norm_epsilon": architecture.norm_epsilon,
            "sliding_window": architecture.sliding_window,
        },
        "config": dict(architecture.config),
    }
    if job.adapter_folder is not None:
        adapter = Adapter.of(job.adapter_folder, architecture.shape)
        found["adapter"] = {
            "path": job.settings.model.adapter,
            "sha256": adapter.sha256,
            "dim": adapter.dim,
            "alpha": adapter.alpha,
        }
    return found


def norm_file_of(job: Job) -> bytes:
    """The store's file with the weight of the final norm."""
    return norm_file(final_norm_weight(open_weights(job.model_folder, job.architecture)), job.architecture.norm_epsilon)


def producer_of(job: Job, work: str, started: float) -> dict[str, Any]:
    """Who works on a store, and how. work: what the job does, in words. started: unix time in seconds."""
    settings = job.settings
    return {
        **record_of(work, job.points, job.topology, started),
        "batch_tokens": settings.data.batch_tokens,
        "packing": settings.data.packing,
        "gather": settings.capture.gather,
    }


def record_of(work: str, points: Iterable[HookPoint], topology: Topology, started: float) -> dict[str, Any]:
    """What is said of every job that works on a store, whatever it does."""
    return {
        "work": work,
        "hook_points": [str(point) for point in points],
        "layout": {axis: getattr(topology, axis) for axis in (*AXES, "sp")},
        "versions": {"nemo_qwen_hidden": __version__, **dict(_versions())},
        "git_revision": _git_revision(),
        "command": sys.argv,
        "started_unix_secs": round(started, 3),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "unknown"


def _git_revision() -> str | None:
    """The commit of the checkout that this package runs from, with ``-dirty`` where files differ from it; None where
    it was installed, or where there is no git."""
    folder = Path(__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
