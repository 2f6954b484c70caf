"""``nemo-qwen-hidden doctor``: looks at a live model on the ranks of a layout, or at a store, and reports."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_qwen_hidden.checkpoint.adapter import Adapter
from nemo_qwen_hidden.checkpoint.architecture import Architecture, read_architecture
from nemo_qwen_hidden.checkpoint.locate import locate
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.cli.fault import fault_line, one_says, saying_at_once
from nemo_qwen_hidden.cli.terminal import Terminal
from nemo_qwen_hidden.config import ModelSettings, Settings
from nemo_qwen_hidden.doctor import foreign, stored, visit
from nemo_qwen_hidden.doctor.checkup import check_up
from nemo_qwen_hidden.doctor.observation import Observation, Passage
from nemo_qwen_hidden.doctor.report import Check, Finding, Report
from nemo_qwen_hidden.doctor.text import lines_of
from nemo_qwen_hidden.errors import ConfigError, PeerError, RankError, UserError, status_of
from nemo_qwen_hidden.job import Job
from nemo_qwen_hidden.parallel import launch
from nemo_qwen_hidden.parallel.watch import Pulse
from nemo_qwen_hidden.store.read.reader import open_store

if TYPE_CHECKING:
    from nemo_qwen_hidden.doctor.live import Examined
    from nemo_qwen_hidden.parallel.groups import ProcessGroups


def at_a_live_model(job: Job, terminal: Terminal, *, documents: int, tokens: int) -> tuple[Report | None, bool]:
    """Runs the model in the layout of ``job``. The report, on ranks other than 0 None, and whether all is well.

    Raises:
        UserError: it could not be done. RankError: a fault. PeerError: a rank of torchrun's failed and has said why.
    """
    log = _log()
    launched = launch.launched_world() is not None
    try:
        with launch.output_to(log):
            run = _be_a_rank if launched else _start_ranks
            done = run(job, terminal, log, documents=documents, tokens=tokens)
    except (UserError, PeerError, KeyboardInterrupt):
        log.unlink(missing_ok=True)
        raise
    except Exception as error:
        raise RankError(fault_line(error, log)) from error
    log.unlink(missing_ok=True)
    return done


def _log() -> Path:
    """Where libraries' words go; it is kept where there was a fault."""
    descriptor, name = tempfile.mkstemp(prefix="nemo_qwen_hidden-doctor-", suffix=".log")
    os.close(descriptor)
    return Path(name)


def _start_ranks(job: Job, terminal: Terminal, log: Path, *, documents: int, tokens: int) -> tuple[Report | None, bool]:
    with launch.one_interrupt():
        launch.warm_up(log)
        passages = visit.choose(job, documents=documents, tokens=tokens)
        terminal.note(f"running {visit.described(passages)} on {job.topology}")
        reports: list[Report | None] = launch.run_ranks(_started, (job, passages), world=job.topology.world, log=log)
    report = reports[0]
    assert report is not None, "rank 0 makes the report"
    return report, report.healthy


def _started(rank: launch.Rank, job: Job, passages: Sequence[Passage]) -> Report | None:
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        examined = _examined(job, passages, groups, rank.pulse)
    return visit.report(job, passages, examined) if rank.rank == 0 else None


def _be_a_rank(job: Job, terminal: Terminal, log: Path, *, documents: int, tokens: int) -> tuple[Report | None, bool]:
    from nemo_qwen_hidden.parallel.agree import broadcast_value, on_rank_0
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.parallel.peers import watched

    pulse = Pulse()
    with (
        saying_at_once(terminal, log),
        process_groups(job.topology) as groups,
        watched(pulse, lambda fault: terminal.error(f"{fault} (more in {log})")),
    ):
        passages = on_rank_0(lambda: visit.choose(job, documents=documents, tokens=tokens), groups, status_of=status_of)
        with one_says():
            examined = _examined(job, passages, groups, pulse)
        report = visit.report(job, passages, examined) if groups.place.rank == 0 else None
        return report, broadcast_value(report is not None and report.healthy, groups)


def _examined(job: Job, passages: Sequence[Passage], groups: "ProcessGroups", pulse: Pulse) -> "Examined":
    import torch

    torch.set_num_threads(job.settings.runtime.threads or launch.fair_threads(job.topology.world))
    with pulse.running():
        return visit.examine(job, passages, groups, pulse.progressed)


def at_a_store(path: str, settings: Settings, *, documents: int, tokens: int) -> Report:
    """Looks at a store of this package, or at states that another program has stored, in this process.

    Raises:
        UserError: it cannot be read, or the model cannot.
    """
    if replace(settings, model=ModelSettings()) != Settings():
        raise ConfigError(
            "--against",
            "must stand with no setting but `model.path` and `model.adapter`: nothing is run in a layout",
            path,
        )
    place = Path(path).expanduser()
    if foreign.is_foreign(place):
        folder = locate(settings.model.path)
        architecture = read_architecture(folder)
        open_weights(folder, architecture)
        count = architecture.shape.num_layers
        observation = foreign.observe(place, num_layers=count, documents=documents, tokens=tokens)
        subject = [("states", str(place))]
        return _report(subject, folder, observation, architecture, [], [], adapter=_adapter(settings.model.adapter))
    store = open_store(path)
    named = store.manifest.model.get("path")
    path_there = named if isinstance(named, str) and named != "embedded demo model" else None
    folder = locate(settings.model.path or path_there)
    architecture = read_architecture(folder)
    weights = open_weights(folder, architecture)
    observation = stored.observe(store, documents=documents, tokens=tokens)
    check, findings = stored.same_weights(store, folder, weights)
    merged = store.manifest.model.get("adapter") or {}
    adapter = _adapter(settings.model.adapter or merged.get("path"))
    subject = [("store", str(path))]
    return _report(subject, folder, observation, architecture, [check], findings, adapter=adapter)


def _adapter(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


def _report(
    subject: Sequence[tuple[str, str]],
    folder: Path,
    observation: Observation,
    architecture: Architecture,
    checks: Sequence[Check],
    findings: Sequence[Finding],
    *,
    adapter: Path | None,
) -> Report:
    dtypes = f"{observation.compute}, stored in {observation.stored}"
    about = [*subject, ("model", str(folder)), ("dtype", dtypes), ("documents", visit.described(observation.passages))]
    if adapter is not None:
        Adapter.of(adapter, architecture.shape)
    return check_up(observation, folder, architecture, adapter=adapter, subject=about, checks=checks, findings=findings)


def show(report: Report, terminal: Terminal) -> None:
    """The report as text, on stdout."""
    for line in lines_of(report):
        terminal.line(line)
