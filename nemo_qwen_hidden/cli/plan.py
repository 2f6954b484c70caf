"""``plan``: what ``extract`` would do and take, here or on GPUs that are not here, and without weights or data."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nemo_qwen_hidden.checkpoint.published import published
from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.cli.plan_options import GPU_HOUR_USD
from nemo_qwen_hidden.cli.show import Facts, count, some
from nemo_qwen_hidden.cli.terminal import Terminal, duration, human
from nemo_qwen_hidden.config import BYTES, MEANS, Settings
from nemo_qwen_hidden.data.tokenize import require_tokens
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.extract import disk_bytes
from nemo_qwen_hidden.job import Job, Outline, outline, prepare
from nemo_qwen_hidden.parallel.launch import launched_world
from nemo_qwen_hidden.parallel.machine import find_host, find_machine
from nemo_qwen_hidden.part import state_counts
from nemo_qwen_hidden.plan.auto import FILLED, Choice
from nemo_qwen_hidden.plan.cost import Machine, need_of
from nemo_qwen_hidden.plan.hardware import GPU_HOST, Host, gpu_machines
from nemo_qwen_hidden.plan.pooling import check_whole
from nemo_qwen_hidden.plan.scaling import AFTER, BEFORE, Corpus, Estimate, Use
from nemo_qwen_hidden.plan.selection import kept_of, samples_all
from nemo_qwen_hidden.store.format import human_bytes

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of the data. squares: of the tokens of each window, summed."""

    documents: int
    rows: int
    windows: int
    states: int
    squares: int

    @property
    def corpus(self) -> Corpus:
        return Corpus(tokens=self.rows, states=self.states, window=max(1, round(self.squares / self.rows)))


@dataclass(frozen=True, kw_only=True)
class Planned:
    """model, data: in words. here: whether the machine is the one that this runs on."""

    outline: Outline
    model: str
    data: str
    counts: Counts
    machine: Machine
    host: Host
    here: bool
    price: float | None

    @property
    def estimate(self) -> Estimate:
        return self.outline.estimate(self.counts.corpus, self.machine, self.host)


def planned(parsed: argparse.Namespace, terminal: Terminal) -> Planned:
    """What the arguments ask for. Tokenizes the data to count its rows, unless ``--tokens`` says how many.

    Raises:
        UserError: it could not be done.
    """
    settings, gpus = compose(parsed.overrides, config=parsed.config), parsed.gpus
    world = launched_world() if gpus is None else gpus
    given = settings.parallel.memory_gb
    machine = None
    if gpus is not None:
        memory_bytes = None if given is None else int(given * GB)
        machine = gpu_machines(gpus, itemsize=BYTES[settings.precision.compute], memory_bytes=memory_bytes)
    seen, model = _seen(parsed, settings, world, machine)
    if parsed.tokens is not None:
        counts, data = _imagined(seen, parsed.tokens), "as if of documents of `data.max_tokens`; not read"
    else:
        assert isinstance(seen, Job)
        counts, data = _counted(seen, terminal), seen.data_path
    machine = machine or _here(settings, world, seen.topology.world)
    host = GPU_HOST if gpus is not None else find_host(machine, seen.topology.world)
    if parsed.disk is not None:
        disk = parsed.disk * GB
        host = replace(host, store=disk, machine=host.machine if gpus is not None else disk)
    price = parsed.price or (GPU_HOUR_USD if gpus is not None else None)
    return Planned(
        outline=seen, model=model, data=data, counts=counts, machine=machine, host=host, here=gpus is None, price=price
    )


def _seen(
    parsed: argparse.Namespace, settings: Settings, world: int | None, machine: Machine | None
) -> tuple[Outline, str]:
    if parsed.shape is None:
        job = prepare(settings, world=world, for_store=False, machine=machine)
        return job, str(job.model_folder)
    if settings.model.path is not None:
        raise ConfigError("model.path", "must be left out where `--shape` gives the sizes", settings.model.path)
    if parsed.tokens is None:
        raise ConfigError("--tokens", "must be given with `--shape`, which has no tokenizer", None)
    seen = outline(settings, published(parsed.shape), world=world, machine=machine)
    return seen, f"Qwen2.5-{parsed.shape}, by its published sizes"


def _here(settings: Settings, world: int | None, ranks: int) -> Machine:
    """What there is; ranks that are more than its cores share them."""
    found = find_machine(settings, world=world)
    return replace(found, per_machine=max(found.per_machine, ranks)) if found.shared_cores and world is None else found


def _counted(job: Job, terminal: Terminal) -> Counts:
    documents = rows = windows = states = squares = cut_documents = 0
    longest = job.batching.max_tokens
    with terminal.progress() as bar:
        for length, cut, kept in state_counts(job):
            documents, rows, windows, states = documents + 1, rows + length, windows + cut, states + kept
            squares += length // longest * longest**2 + (length % longest) ** 2
            cut_documents += cut > 1
            bar.count(rows)
    require_tokens(rows, job.data_path)
    check_whole(job.settings.tokens.pool, cut_documents=cut_documents, max_tokens=longest)
    states = _drawn(job, states)
    return Counts(documents=documents, rows=rows, windows=windows, states=states, squares=squares)


def _imagined(seen: Outline, rows: int) -> Counts:
    """Of documents that fill a window each, the last one shorter. No token of theirs is special."""
    tokens, longest = seen.settings.tokens, seen.batching.max_tokens
    if tokens.keep in ("mask", "assistant"):
        raise ConfigError("tokens.keep", "must be all, last or spans with `--tokens`, which reads no data", tokens.keep)
    whole, rest = divmod(rows, longest)
    sizes = ((whole, longest), (1 if rest else 0, rest))
    states = 0
    for documents, length in sizes:
        kept = len(kept_of(replace(tokens, special=True), length, document=0)) if documents else 0
        states += documents * (min(kept, 1) if tokens.pool in MEANS else kept)
    documents = sum(number for number, _ in sizes)
    squares = sum(number * length**2 for number, length in sizes)
    return Counts(documents=documents, rows=rows, windows=documents, states=_drawn(seen, states), squares=squares)


def _drawn(seen: Outline, states: int) -> int:
    """What a draw of all tokens leaves."""
    tokens = seen.settings.tokens
    whole = samples_all(tokens) and tokens.pool not in MEANS
    return min(states, tokens.sample) if whole and tokens.sample is not None else states


def show(planned: Planned, terminal: Terminal) -> None:
    """What ``extract`` would do, and what that takes."""
    seen = planned.outline
    terminal.table(_facts(planned), "plan")
    if seen.choice is not None:
        terminal.table(seen.choice.reasons, "why this layout")
        terminal.grid(("instead", "a rank", "time", "why not"), _instead_rows(seen.choice), "its neighbours")
    terminal.grid(
        ("stage", "layers", "hook points", "weights", "while it runs"), _stage_rows(seen), "each rank of a stage"
    )
    found = planned.estimate
    where = "here" if planned.here else f"on {planned.machine.world} H100, {planned.machine.per_machine} in a machine"
    terminal.table(_takes(planned, found), f"estimated, {where}")
    header = ("what", "of", "in all", "at", "of at most", "busy")
    terminal.grid(header, _use_rows(found), "what it uses: of each the busiest, and how busy while its step lasts")


def _takes(planned: Planned, found: Estimate) -> Iterable[tuple[str, str]]:
    steps = (("tokenizing", found.before_secs), ("running", found.run_secs), ("sealing", found.after_secs))
    yield "time", f"{duration(found.secs)}: " + ", ".join(f"{name} {duration(secs)}" for name, secs in steps)
    yield "speed", f"{human(planned.counts.rows / found.run_secs)} tokens/s while it runs"
    bound = found.binds
    yield "binds", f"{bound.name}, of {bound.carrier}: {_rate(bound, bound.rate)} at most"
    if planned.price is not None:
        what = "ranks" if planned.machine.shared_cores else "GPUs"
        usd = f"{found.rank_hours * planned.price:,.2f} USD"
        yield "cost", f"{usd}: {human(found.rank_hours)} hours of {what} at {planned.price:g} USD"
    seen = planned.outline
    total, memory = need_of(seen.topology, seen.work).total + planned.machine.base_bytes, planned.machine
    most = FILLED * memory.rank_bytes(seen.topology.world)
    if total > most:
        yield "fits", f"no: {human_bytes(total)} a rank, of {human_bytes(round(most))} that may be filled"


def _use_rows(found: Estimate) -> list[tuple[str, ...]]:
    return [
        (
            use.name,
            use.carrier,
            f"{human(use.amount)}{_unit(use)}",
            _rate(use, found.pace(use)),
            _rate(use, use.rate),
            _part(use, found),
        )
        for use in found.uses
        if use.amount
    ]


def _part(use: Use, found: Estimate) -> str:
    of_step = {BEFORE: found.before_secs, AFTER: found.after_secs}.get(use.when, found.run_secs)
    return f"{use.secs / of_step:.0%}"


def _unit(use: Use) -> str:
    return {"products": "FLOP", "tokenize": "tok"}.get(use.name, "B")


def _rate(use: Use, rate: float) -> str:
    return f"{human(rate)}{_unit(use)}/s"


def _instead_rows(choice: Choice) -> list[tuple[str, ...]]:
    return [
        (
            str(each.topology),
            "-" if each.need_bytes is None else human_bytes(each.need_bytes),
            "-" if each.times is None else f"x {each.times:.2f}",
            each.why,
        )
        for each in choice.rejected
    ]


def _facts(planned: Planned) -> Facts:
    seen, counts = planned.outline, planned.counts
    settings, shape, rows, states = seen.settings, seen.architecture.shape, counts.rows, counts.states
    shards = -(-states // settings.store.shard_rows)
    chosen = [] if states == rows else [("kept", _kept(seen, states))]
    of_each = f"{shards:,} a hook point, of up to {settings.store.shard_rows:,} rows"
    return [
        ("model", planned.model),
        ("layers", f"{seen.num_layers} of {shape.num_layers} are run, in {settings.precision.compute}"),
        ("data", planned.data),
        ("rows", f"{rows:,} tokens of {count(counts.documents, 'document')}"),
        *chosen,
        ("windows", f"{counts.windows:,} of at most {seen.batching.max_tokens:,} tokens"),
        ("hook points", some([str(point) for point in seen.points])),
        ("layout", f"{seen.topology}: {count(seen.topology.world, 'rank')}"),
        ("shards", f"{shards * len(seen.points):,}: {of_each}"),
        ("on disk", f"{human_bytes(disk_bytes(seen, rows=rows, states=states))} in {settings.stored_dtype}"),
    ]


def _kept(seen: Outline, states: int) -> str:
    tokens = seen.settings.tokens
    less = ", less those left out for their norm" if tokens.max_norm is not None else ""
    return count(states, "mean" if tokens.pool in MEANS else "token") + less


def _stage_rows(seen: Outline) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for stage, layers in enumerate(seen.stages):
        need = seen.rank_bytes(stage)
        rows.append(
            (
                str(stage) if seen.topology.vp == 1 else f"{stage}, rank {stage % seen.topology.pp}",
                f"{layers.start} to {layers.stop - 1}" if layers else "none",
                some([str(point) for point in seen.points_of(stage)]),
                human_bytes(need.weights),
                f"up to {human_bytes(need.activations + need.states)}",
            )
        )
    return rows
