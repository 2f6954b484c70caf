"""Functions that ranks run in tests; importable, because the fork server looks them up by name."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology
from tests.support.models import Batch

EVERYTHING = ("embed", "all", "final_norm")


def gathered(
    rank: Rank,
    topology: Topology,
    folders: Sequence[Path],
    batch: Batch,
    options: Sequence[dict[str, Any]],
    dtype: str = "fp32",
) -> Any:
    """For each model, for each set of options, ``hidden_states`` as this rank gets them, in fp32."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    found = []
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        for folder in folders:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, dtype=dtype)
            found.append([_numpy(model, batch, chosen) for chosen in options])
        dist.barrier()
    return found


def _numpy(model: Any, batch: Batch, options: dict[str, Any]) -> dict[HookPoint, Any]:
    states = model.hidden_states(batch.input_ids, lengths=batch.lengths, **{"hook_points": EVERYTHING, **options})
    return {point: state.float().cpu().numpy() for point, state in states.items()}


def in_each_layout(
    rank: Rank, layouts: Sequence[tuple[Topology, dict[str, Any]]], folder: Path, batch: Batch, options: Sequence[Any]
) -> Any:
    """``gathered`` in one layout after the other, all of as many ranks: a topology, and arguments of ``Split``."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.plan.stages import Split

    torch.set_num_threads(1)
    found = []
    for number, (topology, split) in enumerate(layouts):
        rendezvous = rank.rendezvous.with_name(f"{rank.rendezvous.name}-{number}")
        with process_groups(topology, rank=rank.rank, rendezvous=rendezvous) as groups:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, split=Split(**split))
            found.append([_numpy(model, batch, chosen) for chosen in options])
            dist.barrier()
        del model  # before the next is built
    return found


def local_and_all(rank: Rank, topology: Topology, folder: Path, batch: Batch) -> Any:
    """``gather="none"`` and ``gather="all"`` of the same batch, as this rank gets them."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups)
        local = model.hidden_states(batch.input_ids, lengths=batch.lengths, hook_points=EVERYTHING, gather="none")
        whole = _numpy(model, batch, {"gather": "all"})
        dist.barrier()
    held = {p: (s.values.numpy(), s.sequence.numpy(), s.position.numpy()) for p, s in local.items()}
    return held, whole


def layers_computed(rank: Rank, topology: Topology, folder: Path, batch: Batch, hook_points: Sequence[Any]) -> Any:
    """For each set of hook points, Megatron's numbers of the layers that this rank ran, whether it ran the final norm,
    and whether the model is afterwards as it was."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    found = []
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups).train()
        decoder, ran = model.module.decoder, []
        for layer in decoder.layers:
            layer.register_forward_hook(lambda module, *_: ran.append(module.layer_number))
        if decoder.final_layernorm is not None:
            decoder.final_layernorm.register_forward_hook(lambda *_: ran.append("norm"))
        hooks = _hooks(model)
        for points in hook_points:
            ran.clear()
            model.hidden_states(batch.input_ids, lengths=batch.lengths, hook_points=points)
            restored = _hooks(model) == hooks and all(module.training for module in model.modules())
            found.append((list(ran), restored))
        dist.barrier()
    return found


def _hooks(model: Any) -> list[int]:
    return [len(module._forward_hooks) for module in model.modules()]


def stored(rank: Rank, job: Any, begun: Any) -> Any:
    """The ranks' part of an extraction with one thread each."""
    from nemo_qwen_hidden import running
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        return running.run(job, begun, groups)


def all_stored(rank: Rank, work: Sequence[Any]) -> Any:
    """The ranks' part of several extractions in the same layout: of each, the job and what was begun."""
    from nemo_qwen_hidden import running
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(work[0][0].topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        return [running.run(job, begun, groups) for job, begun in work]


def forward_outputs(rank: Rank, topology: Topology, folder: Path, batch: Batch) -> Any:
    """NeMo's own call of the model, ``forward(input_ids, position_ids, attention_mask)``, on a single stage."""
    from nemo_qwen_hidden.errors import ConfigError
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    ids = batch.input_ids
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool().expand(len(ids), 1, -1, -1)
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups, torch.no_grad():
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups)
        causal, masked = model(ids, positions), model(ids, positions, future)
        refused = ""
        try:
            model(ids, positions, labels=ids)
        except ConfigError as error:
            refused = str(error)
        dist.barrier()
    return causal.numpy(), masked.numpy(), refused


def runs_ahead(rank: Rank, folder: Path, batch: Batch, meeting: Path) -> list[int]:
    """On two stages: the second holds its first microbatch back until the first has done three. Returns the order in
    which this stage's microbatches were done."""
    from nemo_qwen_hidden.capture.taps import Capture
    from nemo_qwen_hidden.hookpoint import HookPoint
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.plan.microbatches import Batching, Microbatch, plan

    torch.set_num_threads(1)
    store, order = dist.FileStore(str(meeting), 2), []
    microbatches = list(plan(batch.lengths, Batching(max_tokens=64, batch_tokens=1, packing=False)))
    rows = torch.cat([ids[:length] for ids, length in zip(batch.input_ids, batch.lengths, strict=True)])

    def done(microbatch: Microbatch) -> None:
        order.append(microbatch.index)
        store.set(f"{rank.rank}/{microbatch.index}", "done")

    def hold_back(piece: Any) -> None:
        if piece.microbatch == 0:
            store.wait(["0/2"], timedelta(seconds=60))

    with process_groups(Topology(pp=2), rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups)
        last = HookPoint("resid_post", model.config.num_layers - 1)
        capture = Capture(points=(last,))
        model.capture(
            microbatches, lambda first, n: rows[first : first + n], capture=capture, sink=hold_back, done=done
        )
        dist.barrier()
    return order


def loaded(rank: Rank, topology: Topology, folder: Path, dtype: str) -> tuple[int, int, list[str]]:
    """Bytes of this rank's parameters, peak growth of its own (anonymous) memory while they were read, and names."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups
    from tests.support.memory import PeakAnonymous

    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        with PeakAnonymous() as peak:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, dtype=dtype)
        dist.barrier()
    parameters = dict(model.named_parameters())
    return sum(p.numel() * p.element_size() for p in parameters.values()), peak.growth_bytes, list(parameters)


def losses(rank: Rank, topology: Topology, folders: Sequence[Path], batch: Batch) -> list[Any]:
    """For each model with its output layer: the loss [batch, tokens] of predicting the next token."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    ids = batch.input_ids
    positions, found = torch.arange(ids.shape[1]).expand_as(ids), []
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups, torch.no_grad():
        for folder in folders:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, output_layer=True)
            found.append(model(ids, positions, labels=ids.roll(-1, dims=1)).numpy())
        dist.barrier()
    return found


def custom_layout(rank: Rank, folder: Path, batch: Batch, layout: list[list[str]]) -> Any:
    """``final_norm`` of a model whose stages NeMo made by a layout of the user's, under autocast."""
    from nemo_qwen_hidden.checkpoint.architecture import read_architecture
    from nemo_qwen_hidden.checkpoint.tensors import TensorFiles
    from nemo_qwen_hidden.model.config import configure
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.model.weights import load_weights
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.parallel.host import megatron_on_host
    from nemo_qwen_hidden.plan.stages import split_layers

    torch.set_num_threads(1)
    topology, architecture = Topology(pp=2), read_architecture(folder)
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        layers = architecture.shape.num_layers
        config = configure(architecture, topology, dtype="fp32", stages=split_layers(layers, 2), final_norm=True)
        config.pipeline_model_parallel_layout = layout
        config.__post_init__()
        model = Qwen2HiddenModel(config)
        with megatron_on_host():
            model.configure_model()
        with TensorFiles.of(folder).reader() as reader:
            load_weights(model.module, reader, architecture.shape, groups.place)
        with torch.autocast("cpu", torch.bfloat16):
            states = _numpy(model, batch, {"hook_points": ["resid_post@0", "final_norm"]})
        dist.barrier()
    return [len(stage) for stage in model.stages], states


def open_files_of_models(rank: Rank, folder: Path, models: int) -> tuple[int, int]:
    """Open file descriptors after one and after ``models`` calls of ``from_pretrained()`` without groups."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel

    counts = []
    for _ in range(models):
        Qwen2HiddenModel.from_pretrained(folder)
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    return counts[0], counts[-1]


def of_two_minds(rank: Rank) -> None:
    """Two ranks that want to be in different layouts."""
    from nemo_qwen_hidden.parallel.groups import process_groups

    topology = Topology(tp=2) if rank.rank == 0 else Topology(pp=2)
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous):
        raise AssertionError("these ranks cannot have met")


def most_alive(rank: Rank, topology: Topology, folder: Path, tokens: int) -> int:
    """The most bytes of tensors that were alive at once while this rank ran a few microbatches of ``tokens`` tokens, as
    the allocator counts them; weights, which were there before, are not in it."""
    import json

    from torch.profiler import ProfilerActivity, profile

    from nemo_qwen_hidden.capture.taps import Capture
    from nemo_qwen_hidden.hookpoint import HookPoint
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.plan.microbatches import Batching, plan

    torch.set_num_threads(1)
    batching = Batching(max_tokens=tokens, batch_tokens=tokens, packing=True)
    ids = torch.arange(6 * tokens) % 300
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups)
        capture = Capture(points=(HookPoint("resid_post", model.config.num_layers - 1),))

        def run() -> None:
            model.capture(
                list(plan([tokens] * 6, batching)),
                lambda first, length: ids[first : first + length],
                capture=capture,
                sink=lambda piece: None,
            )

        run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
        dist.barrier()
    trace = rank.rendezvous.with_name(f"trace-{rank.rank}.json")
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in events) - before


def with_and_without_gradients(rank: Rank, folder: Path, batch: Batch) -> tuple[Any, Any]:
    """Decoder outputs [S, B, H] of ``forward`` without gradients, and with them."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel

    torch.set_num_threads(1)
    model = Qwen2HiddenModel.from_pretrained(folder)
    positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    with torch.no_grad():
        without = model(batch.input_ids, positions)
    tracked = model(batch.input_ids, positions)
    assert tracked.requires_grad and not without.requires_grad
    return without.numpy(), tracked.detach().numpy()
