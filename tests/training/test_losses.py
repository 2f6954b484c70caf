"""Losses on states against autograd through transformers, in every layout."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.checkpoint.distributed import DistributedFiles
from nemo_qwen_hidden.errors import CheckpointError, ConfigError, HiddenStatesError
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.lora import ALPHA, DIM, merged
from tests.support.models import Tiny, save_tiny
from tests.support.training import whole_weights
from tests.training import state_loss_trainer, state_losses
from tests.training.state_loss_trainer import Run
from tests.training.state_losses import USUAL, Case, Found, Problem, Truth

BOUND = 1e-5
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "uniform1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block1": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}
TWO_RANKS = {
    "tp2": Topology(tp=2),
    "tp2_sp": Topology(tp=2, sp=True),
    "pp2": Topology(pp=2),
    "pp2_vp2": Topology(pp=2, vp=2),
    "cp2": Topology(cp=2),
    "dp2": Topology(dp=2),
}


HEADS = set(USUAL) - set(state_losses.HEADLESS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("losses")
    state_losses.prepare(made)
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two that wait for each other take minutes for so little where others use the machine too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def truths(folder: Path) -> dict[str, Truth]:
    """By the folder that their gradients are saved in."""
    found = {
        "gradients": state_losses.by_transformers(folder),
        "per_token": state_losses.by_transformers(folder, per_token=True),
        "alone": state_losses.by_transformers(folder, language_model=0.0),
        "seldom": state_losses.by_transformers(folder, only=state_losses.SELDOM),
        "sparse": state_losses.by_transformers(folder, data="sparse"),
        "sparse_per_token": state_losses.by_transformers(folder, data="sparse", per_token=True),
        "nothing": state_losses.by_transformers(folder, data="nothing", per_token=True),
    }
    for name, truth in found.items():
        state_losses.save_gradients(folder / name, truth)
    return found


def check(case: Case | Run, ranks: list[Found], truths: dict[str, Truth]) -> None:
    """Of every rank, every gradient and every value; the ranks together have all heads."""
    seen = set()
    for found in ranks:
        assert not found.error
        worst = max(found.errors, key=found.errors.__getitem__, default="")
        assert not worst or found.errors[worst] <= BOUND, (case, worst, found.errors[worst])
        expected = truths[case.truth].values
        assert found.values == pytest.approx({name: expected[name] for name in case.only}, rel=BOUND)
        seen |= {name.partition("state_heads.")[2].split(".")[0] for name in found.errors if "state_heads" in name}
    assert seen == set(case.only) - set(state_losses.HEADLESS)


def test_one_rank(start_ranks: Start, folder: Path, truths: dict[str, Truth]) -> None:
    alone = Topology()
    cases = [
        *(Case(topology=alone, settings=how) for how in RECOMPUTE.values()),
        Case(topology=alone, grad_scale=1024.0),
        Case(topology=alone, per_token=True, truth="per_token"),
        Case(topology=alone, freeze=True),
    ]
    for case, *ranks in zip(cases, *start_ranks(1, state_losses.run, folder, cases), strict=True):
        check(case, ranks, truths)


def test_two_ranks(start_ranks: Start, folder: Path, truths: dict[str, Truth]) -> None:
    cases = [Case(topology=topology, settings=how) for topology in TWO_RANKS.values() for how in RECOMPUTE.values()]
    cases += [Case(topology=Topology(dp=2), per_token=True, truth="per_token")]
    for case, *ranks in zip(cases, *start_ranks(2, state_losses.run, folder, cases), strict=True):
        check(case, ranks, truths)


def test_microbatches_and_steps_in_which_nothing_counts(
    start_ranks: Start, folder: Path, truths: dict[str, Truth]
) -> None:
    cases = []
    for name in ("dp2", "cp2", "pp2"):
        case = Case(topology=TWO_RANKS[name], data="sparse", truth="sparse")
        cases += [case, replace(case, truth="sparse_per_token", per_token=True)]
        cases += [replace(case, data="nothing", truth="nothing", per_token=True)]
    for case, *ranks in zip(cases, *start_ranks(2, state_losses.run, folder, cases), strict=True):
        check(case, ranks, truths)


def test_losses_of_other_settings(start_ranks: Start, folder: Path, truths: dict[str, Truth]) -> None:
    case = Case(topology=Topology(dp=2), only=state_losses.SELDOM, truth="seldom")
    cases = [replace(case, topology=TWO_RANKS[name]) for name in ("tp2", "tp2_sp", "cp2", "dp2")]
    cases += [replace(case, topology=TWO_RANKS["pp2_vp2"], settings=RECOMPUTE["uniform2"])]
    for case, *ranks in zip(cases, *start_ranks(2, state_losses.run, folder, cases), strict=True):
        check(case, ranks, truths)


def test_four_ranks(start_ranks: Start, folder: Path, truths: dict[str, Truth]) -> None:
    cases = [Case(topology=Topology(tp=2, pp=2), settings=how) for how in RECOMPUTE.values()]
    cases += [Case(topology=Topology(tp=2, cp=2, sp=True)), Case(topology=Topology(tp=2, pp=2), forward_only=True)]
    for case, *ranks in zip(cases, *start_ranks(4, state_losses.run, folder, cases), strict=True):
        if case.forward_only:
            expected = truths["gradients"].values | {"class_accuracy": truths["gradients"].accuracy}
            assert all(found.values == pytest.approx(expected, rel=BOUND) for found in ranks)
        else:
            check(case, ranks, truths)


def test_tied_embeddings(start_ranks: Start, tmp_path: Path) -> None:
    state_losses.prepare(tmp_path, tied=True)
    only = (*USUAL, "started")  # with the embeddings, there being no output layer in the folder
    truth = state_losses.by_transformers(tmp_path, only=only)
    state_losses.save_gradients(tmp_path / "gradients", truth)
    cases = [Case(topology=Topology(pp=2), settings=RECOMPUTE["uniform2"], only=only)]
    for case, *ranks in zip(cases, *start_ranks(2, state_losses.run, tmp_path, cases), strict=True):
        check(case, ranks, {"gradients": truth})


def test_nemo_trainer(start_ranks: Start, folder: Path, truths: dict[str, Truth], tmp_path: Path) -> None:
    checkpoint, uniform = tmp_path / "checkpoint", RECOMPUTE["uniform2"]
    per_token = {"calculate_per_token_loss": True}
    runs = {
        # first: NeMo 2.7.3 changes the class of a model that it trains, and subclasses made afterwards recurse
        # (lightning/megatron_parallel.py:902)
        "alone": Run(topology=Topology(tp=2, sp=True), alone=True, truth="alone"),
        "frozen": Run(
            topology=Topology(pp=2), alone=True, truth="alone", settings=uniform, freeze=True, only=("probe",)
        ),
        "saved": Run(topology=Topology(pp=2, vp=2), settings=uniform, save=checkpoint),
        "per_token": Run(topology=Topology(cp=2), truth="per_token", settings=per_token, then_nothing=True),
        "replicas": Run(topology=Topology(dp=2), settings=uniform),
        "resumed": Run(topology=Topology(tp=2), resume=checkpoint, steps=2, truth=""),
        "packed": Run(topology=Topology(pp=2), only=("probe",), packed=True),
    }
    ranks = start_ranks(2, state_loss_trainer.train, folder, list(runs.values()))
    found = dict(zip(runs, zip(*ranks, strict=True), strict=True))
    for name in ("alone", "frozen", "saved", "per_token", "replicas"):
        check(runs[name], list(found[name]), truths)
    total = sum(state_losses.FACTORS.get(name, 1.0) * value for name, value in truths["alone"].values.items())
    assert found["alone"][0].logged["reduced_train_loss"] == pytest.approx(total, rel=BOUND)
    for rank in found["per_token"]:
        assert all(rank.logged[name] == 0 for name in USUAL) and rank.logged["grad_norm"] == 0
        assert np.isnan(rank.logged["reduced_train_loss"])  # by NeMo 2.7.3, megatron_parallel.py:1854
        assert all(np.isfinite(piece.values).all() for piece in rank.pieces)
    for rank in found["packed"]:  # the second stage too, where there is no loss
        assert "`batch` must be padded where losses are on states, but is 'packed" in rank.error

    saved = whole_weights(found["saved"])
    resumed = whole_weights([replace(rank, pieces=rank.first) for rank in found["resumed"]])
    assert {name.split(".")[1] for name in saved if name.startswith("state_heads.")} == HEADS
    assert saved.keys() == resumed.keys() and all(np.array_equal(saved[name], resumed[name]) for name in saved)
    assert found["resumed"][0].logged["global_step"] == 1


def test_nemo_lora(start_ranks: Start, folder: Path, tmp_path: Path) -> None:
    """Values, gradients of heads and of adapters, and the checkpoint, which has both and opens in another layout."""
    saved, uniform = tmp_path / "adapter", RECOMPUTE["uniform1"]
    runs = [
        Run(topology=Topology(tp=2, sp=True), lora="ours"),
        Run(topology=Topology(pp=2), settings=uniform, lora="ours", save=saved),
        Run(topology=Topology(tp=2), resume=saved, steps=2, lora="ours"),
    ]
    by_run = list(zip(*start_ranks(2, state_loss_trainer.train, folder, runs), strict=True))
    for ranks in by_run[:2]:
        begun = whole_weights([replace(rank, pieces=rank.first) for rank in ranks])
        found = whole_weights([replace(rank, pieces=rank.gradients) for rank in ranks])
        truth = state_losses.by_transformers(folder, given=merged(begun))
        heads = {name for name in truth.gradients if name.startswith("state_heads.") and name.split(".")[1] in HEADS}
        expected = {name: truth.gradients[name].numpy() for name in heads}
        expected |= gradients_of_adapter(begun, truth.gradients, groups=2)
        assert found.keys() == expected.keys() and {name.split(".")[1] for name in found} == {"layers", *HEADS}
        for name, gradient in expected.items():
            error = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
            assert error <= BOUND, (name, error)
        assert all(rank.values == pytest.approx(truth.values, rel=BOUND) for rank in ranks)

    ended = whole_weights(by_run[1])
    resumed = whole_weights([replace(rank, pieces=rank.first) for rank in by_run[-1]])
    assert ended.keys() == resumed.keys() and all(np.array_equal(ended[name], resumed[name]) for name in ended)
    assert by_run[-1][0].logged["global_step"] == 1
    kept = {name for name in DistributedFiles.of(saved / "weights", "here").tensors if not name.startswith("optimizer")}
    assert {name.removeprefix("module.") for name in kept if "_extra_state" not in name} == expected.keys()


def gradients_of_adapter(
    weights: dict[str, np.ndarray], gradients: dict[str, torch.Tensor], *, groups: int
) -> dict[str, np.ndarray]:
    """By the chain rule from the gradient of W + alpha / dim * B A, which transformers has the parts of."""
    found, scale = {}, ALPHA / DIM
    for linear, parts in {
        "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj": ("self_attn.o_proj",),
        "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc2": ("mlp.down_proj",),
    }.items():
        down, up = (f"decoder.layers.{linear}.adapter.linear_{side}.weight" for side in ("in", "out"))
        of_down, of_up = [], []
        for layer, (a, b) in enumerate(zip(weights[down], weights[up], strict=True)):
            pieces = [gradients[f"model.layers.{layer}.{part}.weight"].numpy() for part in parts]
            if "qkv" in linear:  # query group by query group
                pieces = [np.concatenate([piece.reshape(groups, -1, piece.shape[1]) for piece in pieces], axis=1)]
            change = np.concatenate(pieces).reshape(len(b), -1)
            of_up.append(scale * change @ a.T)
            of_down.append(scale * b.T @ change)
        found[down], found[up] = np.stack(of_down), np.stack(of_up)
    return found


def test_a_lora_that_cannot_be_trained_is_refused(start_ranks: Start, folder: Path) -> None:
    ((refused,),) = start_ranks(1, state_loss_trainer.train, folder, [Run(topology=Topology(), lora="nemos")])
    assert "`peft` must leave the heads of losses to be trained, as `training.lora.LoRA`" in refused.error
    virtual = [Run(topology=Topology(pp=2, vp=2), lora="ours")]
    for (refused,) in start_ranks(2, state_loss_trainer.train, folder, virtual):
        assert "`virtual_pipeline_model_parallel_size` must be None with a LoRA" in refused.error


def test_heads_begin_the_same_on_every_layout_and_draw_no_random_numbers(start_ranks: Start, folder: Path) -> None:
    ((alone, untouched),) = start_ranks(1, state_losses.new_heads, folder, Topology())
    halves = start_ranks(2, state_losses.new_heads, folder, Topology(tp=2))
    assert untouched and all(untouched for _, untouched in halves)
    for name, whole in alone.items():
        parts = [half[name] for half, _ in halves]
        assert np.array_equal(np.concatenate(parts) if "output" in name else parts[0], whole)
        assert np.array_equal(parts[0], parts[1]) or "output" in name


def test_bf16(start_ranks: Start, folder: Path) -> None:
    """As far from float64 as transformers is in bf16: twice its largest error, one and a half times its median."""
    truth = state_losses.by_transformers(folder, weights=torch.bfloat16)
    theirs = state_losses.by_transformers(folder, weights=torch.bfloat16, compute=torch.bfloat16)
    state_losses.save_gradients(folder / "bf16", truth)
    known = [
        float((theirs.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in truth.gradients.items()
        if name.startswith("model.")
    ]
    case = Case(topology=TWO_RANKS["pp2"], truth="bf16", dtype="bf16")
    cases = [case, replace(case, topology=TWO_RANKS["tp2_sp"], settings=RECOMPUTE["uniform2"])]
    for _, *ranks in zip(cases, *start_ranks(2, state_losses.run, folder, cases), strict=True):
        for found in ranks:
            assert found.dtypes == {("torch.bfloat16", "torch.float32")}
            assert max(found.errors.values()) <= 2 * max(known)
            assert np.median(list(found.errors.values())) <= 1.5 * np.median(known)
            assert found.values == pytest.approx(truth.values, rel=2**-8)


def test_heads_on_a_frozen_model(start_ranks: Start, folder: Path, truths: dict[str, Truth]) -> None:
    """Also where nothing before a recomputed layer is trained, and where a stage trains nothing."""
    alone = [
        Case(topology=Topology(), settings=how, freeze=True, only=("detached", "value")) for how in RECOMPUTE.values()
    ]
    for case, ranks in zip(alone, *start_ranks(1, state_losses.run, folder, alone), strict=True):
        check(case, [ranks], truths)
    halves = [
        Case(topology=TWO_RANKS[name], settings=RECOMPUTE[how], freeze=True, only=only)
        for name, how, only in (
            ("pp2", "none", ("class",)),
            ("pp2", "uniform1", ("class",)),
            ("pp2", "none", ("probe",)),
            ("pp2", "uniform2", ("probe",)),
            ("pp2_vp2", "block1", ("probe", "narrow")),
            ("tp2_sp", "uniform2", ("narrow", "medusa")),
            ("cp2", "uniform2", ("probe",)),
        )
    ]
    for case, *ranks in zip(halves, *start_ranks(2, state_losses.run, folder, halves), strict=True):
        check(case, ranks, truths)


def test_what_is_refused_of_a_step(start_ranks: Start, folder: Path) -> None:
    ((packed, unsaid, part, unused),) = start_ranks(1, state_losses.refused, folder)
    assert "`batch` must be padded where losses are on states, but is 'packed (cu_seqlens)'" in packed
    assert "but is 'packed (packed_seq_params)'" in unsaid
    assert "`batch` must be whole, and what this rank has of it [tokens, sequences] [16, 2], but is [16, 1]" in part
    assert "loss detached must be computed, and its gradient started, once for each of 1 microbatches" in unused
    assert "computed 1 times and started 0: the main loss must depend on mlp_out@5" in unused


def by_classifier(folder: Path, ids: torch.Tensor, problem: Problem) -> Any:
    """What transformers' own classifier gives, in float64; it and its gradients go to the problem's folder."""
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config.from_pretrained(folder, num_labels=problem.classes, pad_token_id=0, problem_type=problem.kind)
    reference = Qwen2ForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        reference.score.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    classifier, gradients = problem.folder / "classifier", problem.folder / "gradients"
    reference.save_pretrained(classifier)
    labels = problem.labels.double() if problem.labels.is_floating_point() else problem.labels
    given = reference.double()(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
    given.loss.backward()
    gradients.mkdir()
    (gradients / "config.json").write_text((classifier / "config.json").read_text())
    found = {name: p.grad.float().contiguous() for name, p in reference.named_parameters()}
    save_file(found, gradients / "model.safetensors")
    return given


@pytest.mark.parametrize("tp", [1, 2])
def test_sequence_classifier_of_transformers(tp: int, start_ranks: Start, tmp_path: Path) -> None:
    save_tiny(tmp_path / "causal", Tiny(layers=3, groups=2, tied=True), vocab_size=state_losses.VOCAB)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, state_losses.VOCAB, (3, 12), generator=generator)
    ids[0, 7:], ids[1, 3:] = 0, 0  # padding
    problems = [
        Problem(folder=tmp_path / name, kind=kind, classes=classes, labels=labels)
        for name, kind, classes, labels in (
            ("single", "single_label_classification", 3, torch.tensor([2, 0, 1])),
            ("multi", "multi_label_classification", 3, torch.rand(3, 3, generator=generator).round()),
            ("scalar", "regression", 1, torch.randn(3, generator=generator)),
            ("vector", "regression", 2, torch.randn(3, 2, generator=generator)),
        )
    ]
    given = [by_classifier(tmp_path / "causal", ids, problem) for problem in problems]
    for ranks in start_ranks(tp, state_losses.classified, Topology(tp=tp), ids, problems):
        for (loss, logits, errors), expected in zip(ranks, given, strict=True):
            assert loss == pytest.approx(expected.loss.item(), rel=BOUND)
            np.testing.assert_allclose(logits, expected.logits.detach().numpy(), rtol=BOUND, atol=1e-6)
            assert len(errors) > 20 and max(errors.values()) <= BOUND


def _classifier(**arguments: Any) -> Any:
    from nemo_qwen_hidden.training.losses.kinds import SequenceClassifier

    return SequenceClassifier(**{"name": "class", "classes": 2, "last": "last"} | arguments)


def test_settings_of_losses_are_checked(tmp_path: Path) -> None:
    from nemo_qwen_hidden.training.losses.kinds import Distillation, LinearProbe

    with pytest.raises(ConfigError, match="`last of loss class` must be given, or else `pad_token_id`"):
        _classifier(pad_token_id=0)
    with pytest.raises(ConfigError, match="`problem of loss class` must be single_label"):
        _classifier(problem="ranking")
    with pytest.raises(ConfigError, match="must be mse or cosine"):
        Distillation(name="d", hook_point="resid_post@0", store="s", distance="dot")
    with pytest.raises(ConfigError, match="must be one, at a residual site"):
        LinearProbe(name="p", hook_point="z@0", classes=2).point(4)
    with pytest.raises(ConfigError, match="must be one, at a residual site"):
        LinearProbe(name="p", hook_point="all", classes=2).point(4)
    with pytest.raises(ConfigError, match="must name a layer from 0 to 3"):
        LinearProbe(name="p", hook_point="resid_post@4", classes=2).point(4)
    save_tiny(tmp_path / "model", Tiny(layers=3, groups=2, tied=True))
    with pytest.raises(CheckpointError, match=r"must be a folder with the tensor `score\.weight`"):
        _classifier(weights=str(tmp_path / "model")).head(
            SimpleNamespace(
                hidden_size=64,
                init_method_std=0.02,
                use_cpu_initialization=True,
                params_dtype=torch.float32,
                sequence_parallel=False,
            )
        )


def test_batches_are_checked() -> None:
    from nemo_qwen_hidden.hookpoint import HookPoint
    from nemo_qwen_hidden.training.losses.state_loss import Tokens

    place, ids = Topology(tp=2, sp=True, cp=2).at(1), torch.arange(8).expand(2, -1)
    tokens = Tokens.at(HookPoint("embed"), place, {"tokens": ids})
    assert tokens.positions.tolist() == [6, 7] and tokens.of_tp_group.tolist() == [0, 1, 6, 7]
    assert tokens.own(ids).tolist() == [[6, 6], [7, 7]]
    assert [found.tolist() for found in tokens.find(torch.tensor([7, 1]))] == [[1], [0]]
    with pytest.raises(ConfigError, match="must have `values` on every pipeline stage"):
        tokens["values"]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"cuda_graph_impl": "local"}, "bypass hooks"),
        ({"fp8": "hybrid", "recompute_granularity": "full"}, "must not be full in fp8"),
    ],
)
def test_what_losses_cannot_be_attached_to_is_refused(settings: dict[str, Any], said: str) -> None:
    from nemo_qwen_hidden.training.losses.attach import AttachedLosses

    usual = {"cuda_graph_impl": "none", "fp8": None, "recompute_granularity": None, "num_layers": 4}
    chunk: Any = SimpleNamespace(config=SimpleNamespace(**usual | settings))
    with pytest.raises(HiddenStatesError, match=said):
        AttachedLosses([chunk], (), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="names of losses on states` must differ"):
        AttachedLosses([chunk], (_classifier(), _classifier()), None)  # type: ignore[arg-type]
