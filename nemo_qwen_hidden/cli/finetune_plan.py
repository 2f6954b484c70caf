"""``finetune --plan``: what a run would do and take; and the lines that say it of a run that begins."""

from collections.abc import Iterator

from nemo_qwen_hidden.cli.show import Facts, count, some
from nemo_qwen_hidden.cli.terminal import Terminal
from nemo_qwen_hidden.plan.training import bubble, idle
from nemo_qwen_hidden.store.format import human_bytes
from nemo_qwen_hidden.training.job import FinetuningJob
from nemo_qwen_hidden.training.outlook import Captured, Outlook, outlook


def run(job: FinetuningJob, terminal: Terminal) -> None:
    """Reads the data and shows what there is to say.

    Raises:
        UserError: what the run would raise for its data.
    """
    with terminal.progress() as bar:
        seen = outlook(job, bar.count)
    terminal.table(_facts(seen), "plan")
    terminal.table(_data_facts(seen), "data")
    header = ("rank", "layers", "weights", "gradients", "optimizer", "held", "captured", "in all")
    terminal.grid(header, _memory_rows(seen), "memory of a rank, by its place in the pipeline (held: activations)")
    if seen.stores:
        terminal.grid(("captured", "steps", "first", "last", "rows a step", "into"), _captured_rows(seen), "capture")
    terminal.table(_disk_facts(seen), "on disk")


def brief(seen: Outlook) -> Iterator[str]:
    """Lines for a run that begins."""
    job, train = seen.job, seen.job.settings.train
    if seen.first_step >= train.max_steps:
        yield f"all {count(train.max_steps, 'step')} are done"
        return
    of_step = f"{train.global_batch_size} x {train.seq_length} tokens, {_microbatches(seen)}"
    yield f"steps {seen.first_step + 1:,} to {train.max_steps:,} of {of_step}"
    yield f"{job.topology}: {_stages(job)}, up to {human_bytes(max(each.total for each in seen.memory))} a rank"
    into = [
        f"at {count(sum(len(each.steps) for each in store.captured), 'step')} into {store.path} "
        f"({human_bytes(store.bytes)})"
        for store in seen.stores
    ]
    if into:
        yield f"captured: {some([str(point) for point in job.points])}; {', '.join(into)}"


def _facts(seen: Outlook) -> Facts:
    job, topology = seen.job, seen.job.topology
    train, precision = job.settings.train, job.settings.precision
    begun = f"goes on after step {seen.first_step:,}, in any layout" if job.begun else "new"
    facts = [
        ("run", f"{begun}; {train.max_steps:,} steps in all, in {precision.compute}: {job.run_path}"),
        ("model", str(job.model_folder)),
        ("layout", f"{topology}: {count(topology.world, 'rank')}, {_stages(job)}"),
        ("step", f"{train.global_batch_size} sequences of {train.seq_length:,} tokens, {_microbatches(seen)}"),
        ("recompute", train.recompute + (f", {train.recompute_layers} layers" if train.recompute_layers > 1 else "")),
    ]
    if train.lora_dim is not None:
        trained, whole = (sum(getattr(each, name) for each in seen.memory) for name in ("trained", "parameters"))
        share = f"{trained * topology.tp:,} of {whole * topology.tp:,} numbers"
        facts.append(("trained", f"a LoRA of dimension {train.lora_dim:,}, {share}"))
    if topology.pp > 1:
        waits = bubble(topology, seen.microbatches)
        schedule = "1F1B" if topology.vp == 1 else "interleaved 1F1B"
        idles = f"idles {idle(topology, seen.microbatches):.1%} of a step ({schedule}: (pp-1)/(vp m) = {waits:.3g})"
        facts.append(("pipeline", idles))
    return facts


def _data_facts(seen: Outlook) -> Facts:
    counts, train = seen.counts, seen.job.settings.train
    assert counts is not None
    about = "" if counts.exact else "about "
    there = "the run's own sequences; the documents were not read"
    read = f"{count(counts.documents or 0, 'document')}, {about}{counts.tokens or 0:,} tokens"
    batch = train.global_batch_size
    facts = [
        ("data", seen.job.data_path),
        ("holds", there if counts.documents is None else read),
        ("training", f"{about}{count(counts.train, 'sequence')}: a pass takes {counts.train / batch:,.4g} steps"),
        ("passes", f"{about}{train.max_steps * batch / counts.train:,.3g} of `train.max_steps`"),
    ]
    held = f"{count(counts.held_out, 'document')}, {about}{count(counts.validation, 'sequence')}"
    if seen.validations:
        when = f"after every {count(seen.validations.step, 'step')}: {seen.validation_samples:,} sequences"
        facts.append(("validation", f"{held}; {when}"))
    return facts


def _memory_rows(seen: Outlook) -> list[tuple[str, ...]]:
    job, rows = seen.job, []
    for rank, need in enumerate(seen.memory):
        layers = [job.stages[stage] for stage in range(rank, len(job.stages), job.topology.pp)]
        sizes = (need.weights, need.gradients, need.optimizer, need.activations, need.states + need.queue, need.total)
        rows.append((str(rank), ", ".join(_layers(each) for each in layers), *map(human_bytes, sizes)))
    return rows


def _captured_rows(seen: Outlook) -> list[tuple[str, ...]]:
    return [
        (each.phase, *_steps(each), f"{each.rows:,}", str(store.path))
        for store in seen.stores
        for each in store.captured
    ]


def _steps(captured: Captured) -> tuple[str, str, str]:
    steps = captured.steps
    return (f"{len(steps):,}", f"{steps[0]:,}", f"{steps[-1]:,}") if steps else ("0", "-", "-")


def _disk_facts(seen: Outlook) -> Facts:
    kept, most = seen.checkpoints
    job, size = seen.job, seen.checkpoint_bytes
    while_written = f"; {most}, {human_bytes(most * size)} while one is written" if most > kept else ""
    facts = [
        ("checkpoint", f"about {human_bytes(size)}"),
        ("kept", f"{kept}, {human_bytes(kept * size)}{while_written}"),
    ]
    to_come = " to come" if job.begun else ""
    for store in seen.stores:
        points = some([str(point) for point in job.points])
        facts.append((store.setting, f"{human_bytes(store.bytes)}{to_come}, of {points}"))
    for disk in seen.disks:
        room = "room" if disk.needed <= disk.free else "no room"
        of = ", ".join(need.setting for need in disk.needs)
        facts.append((room, f"{human_bytes(disk.needed)} of {human_bytes(disk.free)} that are free, for {of}"))
    return facts


def _microbatches(seen: Outlook) -> str:
    train = seen.job.settings.train
    return f"{count(seen.microbatches, 'microbatch')} of {train.micro_batch_size}".replace("hs ", "hes ")


def _stages(job: FinetuningJob) -> str:
    stages = [_layers(each) for each in job.stages]
    return f"layers {', '.join(stages)}" if len(stages) < 5 else f"stages of layers {some(stages)}"


def _layers(layers: range) -> str:
    if len(layers) < 2:
        return str(layers.start) if layers else "none"
    return f"{layers.start} to {layers.stop - 1}"
