"""Losses on states of a tiny model: in Megatron's schedules on ranks, and by autograd through transformers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology
from tests.store.helpers import make_store
from tests.support.capturing import transformers_model
from tests.support.models import Tiny, save_tiny

LAYERS, HIDDEN, VOCAB, TEACHER_WIDTH = 8, 64, 384, 24
CLASSES, HEADS, DECAY, TAGS = 3, 2, 0.8, 4
MICROBATCHES, SEQUENCES, LENGTH = 4, 2, 16
IGNORED = -100
FACTORS = {"early": 0.5, "probe": 2.0, "class": 3.0}
USUAL = ("early", "probe", "same", "narrow", "detached", "value", "class", "medusa")
SELDOM = ("projected", "width", "regressed", "tagged", "started")
HEADLESS = ("same",)


def losses(folder: Path) -> tuple[Any, ...]:
    """One of each kind, on every stage of every layout; and others of the same kinds."""
    from nemo_qwen_hidden.training.losses import kinds

    same = {"store": str(folder / "same"), "teacher": "resid_post@1"}
    narrow = {"store": str(folder / "narrow"), "teacher": "embed"}
    made = (
        kinds.ValueHead(name="early", hook_point="embed", targets="values", mask="loss_mask"),
        kinds.LinearProbe(name="probe", hook_point="attn_out@0", classes=CLASSES),
        kinds.Distillation(name="same", hook_point="resid_post@2", **same),
        kinds.Distillation(name="narrow", hook_point="resid_mid@4", distance="cosine", **narrow),
        kinds.LinearProbe(name="detached", hook_point="mlp_out@5", classes=CLASSES, detach=True),
        kinds.ValueHead(name="value", hook_point="resid_post@-1", targets="values"),
        kinds.SequenceClassifier(name="class", classes=CLASSES, last="last"),
        kinds.MedusaHeads(name="medusa", heads=HEADS, vocab_size=VOCAB - 1, decay=DECAY),
        kinds.Distillation(name="projected", hook_point="resid_post@1", project=True, **same),
        kinds.Distillation(name="width", hook_point="resid_post@5", **narrow),
        kinds.SequenceClassifier(
            name="regressed", hook_point="resid_pre@3", classes=1, problem=kinds.REGRESSION, labels="score", last="last"
        ),
        kinds.SequenceClassifier(name="tagged", classes=TAGS, problem=kinds.MULTI_LABEL, labels="tags", last="last"),
        kinds.MedusaHeads(name="started", heads=1, vocab_size=VOCAB, decay=DECAY, weights=str(folder / "model")),
    )
    return tuple(replace(loss, weight=FACTORS.get(loss.name, 1.0)) for loss in made)


def prepare(folder: Path, *, tied: bool = False) -> None:
    """A model, two teachers, head weights and batches."""
    save_tiny(folder / "model", Tiny(layers=LAYERS, groups=2, tied=tied), vocab_size=VOCAB)
    make_store(folder / "same", lengths=(60,), hidden_size=HIDDEN, points=(HookPoint("resid_post", 1),))
    make_store(folder / "narrow", lengths=(60,), hidden_size=TEACHER_WIDTH, points=(HookPoint("embed"),))
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    heads = {
        "early.weight": random(1, HIDDEN), "early.bias": random(1),
        "probe.weight": random(CLASSES, HIDDEN), "probe.bias": random(CLASSES),
        "narrow.weight": random(TEACHER_WIDTH, HIDDEN),
        "detached.weight": random(CLASSES, HIDDEN), "detached.bias": random(CLASSES),
        "value.weight": random(1, HIDDEN), "value.bias": random(1),
        "class.weight": random(CLASSES, HIDDEN),
        "projected.weight": random(HIDDEN, HIDDEN), "width.weight": random(TEACHER_WIDTH, HIDDEN),
        "regressed.weight": random(1, HIDDEN), "tagged.weight": random(TAGS, HIDDEN),
    }  # fmt: skip
    for number in range(HEADS):
        heads[f"medusa.{number}.residual.weight"] = random(HIDDEN, HIDDEN)
        heads[f"medusa.{number}.residual.bias"] = random(HIDDEN)
        heads[f"medusa.{number}.output.weight"] = random(VOCAB, HIDDEN)
    save_file(heads, folder / "heads.safetensors")
    torch.save({"usual": batches(), "sparse": sparse(), "nothing": nothing()}, folder / "batches.pt")


def batches() -> list[dict[str, Tensor]]:
    """Of different lengths, so that microbatches and halves of the sequence differ in what counts."""
    generator = torch.Generator().manual_seed(9)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (SEQUENCES, LENGTH), generator=generator)

    made = []
    for number in range(MICROBATCHES):
        lengths = torch.tensor([LENGTH - number, 5 + 2 * number])
        inside = torch.arange(LENGTH) < lengths[:, None]
        rows = integers(0, 60)
        rows[torch.rand(rows.shape, generator=generator) < 0.3] = -1
        labels = integers(0, CLASSES)
        labels[~inside] = IGNORED
        made.append(
            {
                "tokens": integers(0, VOCAB - 1), "labels": integers(0, VOCAB - 1), "loss_mask": inside.float(),
                "position_ids": torch.arange(LENGTH).expand(SEQUENCES, -1),
                "values": torch.randn(SEQUENCES, LENGTH, generator=generator),
                "token_classes": labels, "teacher_rows": rows, "last": lengths - 1,
                "classes": torch.tensor([number % CLASSES, IGNORED if number == 2 else 1]),
                "score": torch.randn(SEQUENCES, generator=generator),
                "tags": torch.rand(SEQUENCES, TAGS, generator=generator).round(),
            }
        )  # fmt: skip
    return made


def sparse() -> list[dict[str, Tensor]]:
    """As ``batches``, but 0 counts no token, 2 has no label at all either, and of 1 tokens count that the second of
    two context-parallel ranks alone has. So the first of two replicas counts none in a whole step."""
    made = batches()
    inside = torch.arange(LENGTH).div(LENGTH // 4, rounding_mode="floor").remainder(3) != 0  # of four chunks 1 and 2
    made[1]["loss_mask"] *= inside
    made[1]["token_classes"][:, ~inside] = IGNORED
    made[1]["teacher_rows"][:, ~inside] = -1
    for number in (0, 2):
        made[number]["loss_mask"].zero_()
    made[2]["token_classes"].fill_(IGNORED)
    made[2]["teacher_rows"].fill_(-1)
    made[2]["classes"].fill_(IGNORED)
    return made


def nothing() -> list[dict[str, Tensor]]:
    """As ``batches``, but no token counts."""
    return [batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])} for batch in batches()]


# by transformers -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Truth:
    """values: of each loss, its mean over the microbatches. accuracy: the same of the classifier's. gradients: by
    transformers' names, and of heads as ``state_heads.NAME``."""

    values: dict[str, float]
    gradients: dict[str, Tensor] = field(repr=False)
    accuracy: float


def by_transformers(
    folder: Path,
    *,
    data: str = "usual",
    only: Sequence[str] = USUAL,
    per_token: bool = False,
    language_model: float = 1.0,
    weights: torch.dtype = torch.float64,
    compute: torch.dtype = torch.float64,
    given: Mapping[str, np.ndarray] | None = None,
) -> Truth:
    """All in one graph; the losses and their heads in float64. weights: rounded to this. compute: the model's dtype.
    given: weights by Megatron's names, instead of those of the folder. A mean over nothing is 0."""
    from transformers import Qwen2ForCausalLM

    if given is None:
        how: dict[str, Any] = {"dtype": weights, "attn_implementation": "eager"}
        model: Any = Qwen2ForCausalLM.from_pretrained(folder / "model", **how).eval()
    else:
        model = transformers_model(folder / "model", dict(given), weights)
    model = model.to(compute)
    heads = load_file(folder / "heads.safetensors") | {
        "started.0.residual.weight": torch.zeros(HIDDEN, HIDDEN),
        "started.0.residual.bias": torch.zeros(HIDDEN),
        "started.0.output.weight": model.lm_head.weight.detach().clone(),
    }
    heads = {name: w.to(weights).double().requires_grad_() for name, w in heads.items()}
    states: dict[str, Tensor] = {}
    layers = model.model.layers
    handles = [
        model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: states.update(early=out)),
        layers[0].self_attn.register_forward_hook(lambda _m, _i, out: states.update(probe=out[0])),
        layers[1].register_forward_hook(lambda _m, _i, out: states.update(projected=_first(out))),
        layers[3].register_forward_pre_hook(lambda _m, given: states.update(regressed=given[0])),
        layers[5].register_forward_hook(lambda _m, _i, out: states.update(width=_first(out))),
        layers[2].register_forward_hook(lambda _m, _i, out: states.update(same=_first(out))),
        layers[4].post_attention_layernorm.register_forward_pre_hook(lambda _m, given: states.update(narrow=given[0])),
        layers[5].mlp.register_forward_hook(lambda _m, _i, out: states.update(detached=out.detach())),
        layers[7].register_forward_hook(lambda _m, _i, out: states.update(value=_first(out))),
        model.model.norm.register_forward_hook(
            lambda _m, _i, out: states.update(dict.fromkeys(("class", "medusa", "tagged", "started"), out))
        ),
    ]
    everything = torch.load(folder / "batches.pt")[data]
    weights = [float(batch["loss_mask"].sum()) if per_token else 1.0 for batch in everything]
    total, values, accuracy = torch.zeros((), dtype=torch.float64), dict[str, float](), 0.0
    for batch, weight in zip(everything, weights, strict=True):
        logits = model(batch["tokens"], use_cache=False).logits.double()
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        mask = batch["loss_mask"].flatten().double()
        share = weight / max(sum(weights), 1)
        total = total + language_model * share * _mean(losses * mask, mask)
        given = {name: state.double() for name, state in states.items()}
        for name, value in _plain(given, heads, batch, folder).items():
            if name in only:
                total = total + FACTORS.get(name, 1.0) * share * value
                values[name] = values.get(name, 0.0) + share * value.item()
        last = given["class"][torch.arange(SEQUENCES), batch["last"]]
        right = (last @ heads["class.weight"].T).argmax(dim=1) == batch["classes"]
        accuracy += share * _mean(right, batch["classes"] != IGNORED).item()
    total.backward()
    for handle in handles:
        handle.remove()
    gradients = {name: _grad(p) for name, p in model.named_parameters()}
    return Truth(
        values=values,
        accuracy=accuracy,
        gradients=gradients | {f"state_heads.{name}": _grad(w) for name, w in heads.items()},
    )


def _grad(parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).double()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _mean(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Of those that count; 0 where none does."""
    return values.sum() / (values.numel() if counts is None else max(counts.sum(), 1))


def _plain(
    states: Mapping[str, Tensor], heads: Mapping[str, Tensor], batch: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Each loss of one microbatch as one would write it in plain torch."""

    def linear(name: str) -> Tensor:
        return F.linear(states[name], heads[f"{name}.weight"], heads.get(f"{name}.bias"))

    def at_last(name: str) -> Tensor:
        return linear(name)[torch.arange(SEQUENCES), batch["last"]]

    def squared(name: str, target: Tensor) -> Tensor:
        return (linear(name).squeeze(-1) - target).square()

    def classified(logits: Tensor, labels: Tensor) -> Tensor:
        total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return _mean(total, labels != IGNORED)

    def ahead(name: str, number: int, vocab: int) -> Tensor:
        state, later = states[name], number + 1
        w1, b1, w2 = (
            heads[f"{name}.{number}.{part}"] for part in ("residual.weight", "residual.bias", "output.weight")
        )
        logits = (F.silu(state @ w1.T + b1) + state) @ w2[:vocab].T
        losses = F.cross_entropy(logits[:, :-later].mT, batch["labels"][:, later:], reduction="none")
        return DECAY**later * _mean(losses * mask[:, later:], mask[:, later:])

    def distances(name: str, state: Tensor, teacher: str) -> Tensor:
        target = _teacher(folder / teacher)[rows.clamp(min=0)]
        if name == "narrow":
            return _mean((1 - F.cosine_similarity(state, target, dim=-1)) * (rows >= 0), rows >= 0)
        return _mean((state - target).square().mean(dim=-1) * (rows >= 0), rows >= 0)

    mask, values, rows = batch["loss_mask"], batch["values"].double(), batch["teacher_rows"]
    return {
        "early": _mean(squared("early", values) * mask, mask),
        "probe": classified(linear("probe"), batch["token_classes"]),
        "same": distances("same", states["same"], "same"),
        "narrow": distances("narrow", linear("narrow"), "narrow"),
        "detached": classified(linear("detached"), batch["token_classes"]),
        "value": _mean(squared("value", values)),
        "class": classified(at_last("class"), batch["classes"]),
        "medusa": ahead("medusa", 0, VOCAB - 1) + ahead("medusa", 1, VOCAB - 1),
        "projected": distances("projected", linear("projected"), "same"),
        "width": distances("width", linear("width"), "narrow"),
        "regressed": F.mse_loss(at_last("regressed").squeeze(-1), batch["score"].double()),
        "tagged": F.binary_cross_entropy_with_logits(at_last("tagged"), batch["tags"].double()),
        "started": ahead("started", 0, VOCAB),
    }


def _teacher(folder: Path) -> Tensor:
    from nemo_qwen_hidden.store.read.reader import open_store

    store = open_store(folder)
    return store[store.hook_points[0]][:].double()


def save_gradients(folder: Path, truth: Truth) -> Path:
    """As a checkpoint, so that what cuts weights into the parts of ranks cuts gradients too."""
    folder.mkdir()
    (folder / "config.json").write_text((folder.parent / "model" / "config.json").read_text())
    save_file(
        {name: g.float().contiguous() for name, g in truth.gradients.items() if not name.startswith("state_heads.")},
        folder / "model.safetensors",
    )
    save_file(
        {name.removeprefix("state_heads."): g.float() for name, g in truth.gradients.items() if "state_heads." in name},
        folder / "heads.safetensors",
    )
    return folder


# on ranks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One schedule run. settings: of Megatron's configuration. grad_scale: of the optimizer. truth: a folder of
    ``save_gradients``. data: which batches. freeze: all but the heads. only: names of the losses that there are."""

    topology: Topology
    truth: str = "gradients"
    data: str = "usual"
    settings: Mapping[str, Any] = field(default_factory=dict)
    grad_scale: float = 1.0
    per_token: bool = False
    freeze: bool = False
    only: tuple[str, ...] = USUAL
    dtype: str = "fp32"
    forward_only: bool = False


@dataclass(kw_only=True)
class Found:
    """errors: of each parameter of this rank, |gradient - truth| / |truth|. values: of each loss. dtypes: of
    parameters, and of their gradients."""

    errors: dict[str, float]
    values: dict[str, float]
    error: str = ""
    dtypes: set[tuple[str, str]] = field(default_factory=set)


def run(rank: Rank, folder: Path, cases: Sequence[Case]) -> list[Found]:
    """Each case in turn; those of one topology share their process groups."""
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.parallel.host import training_on_host

    torch.set_num_threads(1)
    found: list[Found] = []
    changes = [0] + [n for n, (a, b) in enumerate(pairwise(cases), 1) if a.topology != b.topology] + [len(cases)]
    for start, stop in pairwise(changes):
        meeting = rank.rendezvous.with_name(f"{rank.rendezvous.name}-{start}")
        with process_groups(cases[start].topology, rank=rank.rank, rendezvous=meeting) as groups, training_on_host():
            found += [_schedule(case, folder, groups) for case in cases[start:stop]]
            dist.barrier()
    return found


def chosen(folder: Path, only: Sequence[str] = USUAL) -> tuple[Any, ...]:
    """The losses of these names."""
    return tuple(loss for loss in losses(folder) if loss.name in only)


def chunks_of(case: Case, folder: Path, weights: Path, heads: Path) -> list[Any]:
    """Megatron's models of this rank, filled."""
    from nemo_qwen_hidden.model.config import configure_training
    from nemo_qwen_hidden.plan.stages import stages_of

    topology = case.topology
    settings: dict[str, Any] = {"calculate_per_token_loss": case.per_token, "state_losses": chosen(folder, case.only)}
    if topology.pp > 1:
        settings["microbatch_group_size_per_vp_stage"] = topology.pp
    stages = stages_of(LAYERS, pp=topology.pp, vp=topology.vp)
    config = configure_training(weights, topology, stages=stages, dtype=case.dtype, **settings | dict(case.settings))
    if case.grad_scale != 1:
        config.grad_scale_func = lambda loss: loss * case.grad_scale
    chunks = []
    for vp_stage in range(topology.vp):
        chunk = config.configure_model(None, vp_stage=vp_stage if topology.vp > 1 else None)
        fill_heads(chunk, load_file(heads), topology.at(dist.get_rank()))
        chunks.append(chunk)
    return chunks


def fill_heads(chunk: Any, heads: Mapping[str, Tensor], place: Any) -> None:
    """``started`` keeps the weights that it begins with, and is not in the file of weights."""
    if hasattr(chunk, "state_heads"):
        with torch.no_grad():
            for name, parameter in chunk.state_heads.named_parameters():
                if name in heads:
                    rows = len(parameter) * place.tp if "output" in name else 0
                    parameter.copy_(heads[name][rows : rows + len(parameter)])


def _schedule(case: Case, folder: Path, groups: Any) -> Found:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    from nemo_qwen_hidden.errors import HiddenStatesError
    from nemo_qwen_hidden.training.losses.attach import AttachedLosses

    chunks = chunks_of(case, folder, folder / "model", folder / "heads.safetensors")
    config = chunks[0].config
    if case.freeze:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_("state_heads" in name)
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    narrow = case.dtype != "fp32"
    wrapped = [
        DistributedDataParallel(config, options, Float16Module(config, chunk) if narrow else chunk) for chunk in chunks
    ]
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    config.finalize_model_grads_func = finalize_model_grads
    topology = case.topology
    mine = torch.load(folder / "batches.pt")[case.data][groups.place.dp :: topology.dp]

    with ExitStack() as stack:
        try:
            attached = stack.enter_context(AttachedLosses(chunks, chosen(folder, case.only), groups))
            attached.begin_step(num_microbatches=len(mine), forward_only=case.forward_only)
            stack.enter_context(torch.set_grad_enabled(not case.forward_only))
            get_forward_backward_func()(
                forward_step_func=_forward_step(attached, groups, case),
                data_iterator=[iter(mine) for _ in chunks] if topology.vp > 1 else iter(mine),
                model=wrapped if topology.vp > 1 else wrapped[0],
                num_microbatches=len(mine),
                seq_length=LENGTH,
                micro_batch_size=SEQUENCES,
                forward_only=case.forward_only,
            )
            values = attached.end_step()
        except HiddenStatesError as error:
            return Found(errors={}, values={}, error=str(error))
    if case.forward_only:
        return Found(errors={}, values=values)
    truth = folder / case.truth
    expected = chunks_of(Case(topology=topology, only=case.only), folder, truth, truth / "heads.safetensors")
    trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    dtypes = {(str(p.dtype), str(p.main_grad.dtype)) for p in trained}
    return Found(errors=errors_of(chunks, expected, scale=case.grad_scale), values=values, dtypes=dtypes)


def errors_of(chunks: Sequence[Any], expected: Sequence[Any], *, scale: float = 1.0) -> dict[str, float]:
    """Of each trained parameter of this rank, by its chunk and its name; ``expected`` has the gradients as weights."""
    errors = {}
    for number, (chunk, wanted) in enumerate(zip(chunks, expected, strict=True)):
        truth = dict(wanted.named_parameters())
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                errors[f"{number}:{name}"] = _error(parameter.main_grad / scale, truth[name])
    return errors


def _error(found: Tensor, truth: Tensor) -> float:
    difference, size = (found.double() - truth.double()).norm(), truth.double().norm()
    return float(difference / size) if size else float(difference)


def _forward_step(attached: Any, groups: Any, case: Case) -> Callable[[Any, Any], Any]:
    def cut(values_BS: Tensor) -> Tensor:
        cp, rank = groups.topology.cp, groups.place.cp
        chunks = values_BS.chunk(2 * cp, dim=1)
        return values_BS if cp == 1 else torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]], dim=1)

    def step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        attached.begin_microbatch(batch)
        output = model(cut(batch["tokens"]), cut(batch["position_ids"]), None, labels=cut(batch["labels"]))
        count = batch["loss_mask"].sum().clamp(min=1)

        def loss(losses_BS: Tensor) -> Any:
            mask = cut(batch["loss_mask"])
            total = (losses_BS * mask).sum()
            if case.per_token:
                return total, mask.sum().int(), {"loss": total.detach()}
            return total / count, {"loss": total.detach()}

        return output, loss

    return step


def new_heads(rank: Rank, folder: Path, topology: Topology) -> tuple[dict[str, Any], bool]:
    """Weights of heads as they begin, this rank's part of each, and whether making them drew no random numbers."""
    from nemo_qwen_hidden.model.config import configure_training
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.parallel.host import training_on_host
    from nemo_qwen_hidden.plan.stages import stages_of

    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous), training_on_host():
        config = configure_training(folder / "model", topology, stages=stages_of(LAYERS, pp=1, vp=1))
        chunk = config.configure_model(None)
        before = torch.get_rng_state()
        for loss in losses(folder):
            loss.add_head(chunk, config)
        untouched = torch.equal(before, torch.get_rng_state())
        dist.barrier()
    return {name: p.detach().numpy() for name, p in chunk.state_heads.named_parameters()}, untouched


def refused(rank: Rank, folder: Path) -> list[str]:
    """What is said to a packed batch, to one that says nothing of being packed, to part of a batch, and to a main loss
    that does not depend on the states."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from nemo_qwen_hidden.errors import HiddenStatesError
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.parallel.host import training_on_host
    from nemo_qwen_hidden.training.losses.attach import AttachedLosses

    case = Case(topology=Topology(), only=("detached", "value"))
    batch = batches()[0]
    part = {name: values[:1] for name, values in batch.items()}
    said = []
    with process_groups(case.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups, training_on_host():
        (chunk,) = chunks_of(case, folder, folder / "model", folder / "heads.safetensors")
        with AttachedLosses([chunk], chosen(folder, case.only), groups) as attached:

            def step(batch: Mapping[str, Tensor], **more: Any) -> None:
                attached.begin_step(num_microbatches=1)
                attached.begin_microbatch(batch)
                chunk(*inputs, None, **more)
                attached.end_step()

            inputs = batch["tokens"], batch["position_ids"]
            packed = {"packed_seq_params": PackedSeqParams()}
            for given, more in ((batch | {"cu_seqlens": torch.zeros(2)}, {}), (batch, packed), (part, {}), (batch, {})):
                try:
                    step(given, **more)
                except HiddenStatesError as error:
                    said.append(str(error))
    return said


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A classifier of transformers' in ``folder``/classifier, and its gradients in ``folder``/gradients. labels: of its
    sequences."""

    folder: Path
    kind: str
    classes: int
    labels: Tensor


def classified(
    rank: Rank, topology: Topology, ids: Tensor, problems: Sequence[Problem]
) -> list[tuple[float, Any, dict[str, float]]]:
    """Of each problem loss, logits and errors of gradients, without a schedule."""
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.parallel.host import training_on_host

    torch.set_num_threads(1)
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups, training_on_host():
        found = [_classified(groups, ids, problem) for problem in problems]
        dist.barrier()
    return found


def _classified(groups: Any, ids: Tensor, problem: Problem) -> tuple[float, Any, dict[str, float]]:
    from nemo_qwen_hidden.capture.sites import visit_site
    from nemo_qwen_hidden.model.config import configure_training
    from nemo_qwen_hidden.plan.stages import stages_of
    from nemo_qwen_hidden.training.losses.attach import AttachedLosses
    from nemo_qwen_hidden.training.losses.kinds import SequenceClassifier
    from nemo_qwen_hidden.training.losses.state_loss import Tokens

    batch, positions = {"tokens": ids, "classes": problem.labels}, torch.arange(ids.shape[1]).expand_as(ids)
    point, states = HookPoint("final_norm"), []

    def built(weights: Path) -> tuple[Any, Any]:
        loss = SequenceClassifier(
            name="class", classes=problem.classes, problem=problem.kind, pad_token_id=0, weights=str(weights)
        )
        stages = stages_of(3, pp=1, vp=1)
        config = configure_training(weights, groups.topology, stages=stages, output_layer=False, state_losses=(loss,))
        return loss, config.configure_model(None)

    loss, chunk = built(problem.folder / "classifier")
    chunk.train()
    visit_site(chunk, point, lambda state, _given: states.append(state.detach()))
    with AttachedLosses([chunk], (loss,), groups) as attached:
        attached.begin_step(num_microbatches=1)
        attached.begin_microbatch(batch)
        (chunk(ids, positions, None) * 0).sum().backward()
        value = attached.end_step()["class"]
    tokens = Tokens.at(point, groups.place, batch)
    logits, _ = loss.logits(states[0], tokens, chunk.state_heads.get_submodule("class"))
    _, expected = built(problem.folder / "gradients")
    truth = dict(expected.named_parameters())
    errors = {name: _error(p.grad, truth[name]) for name, p in chunk.named_parameters()}
    return value, logits.detach().numpy(), errors
