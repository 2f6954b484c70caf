"""Losses on states against autograd through transformers, in every layout."""

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
from tests.training.state_losses import Case, Found, Truth

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


HEADS = {"early", "probe", "narrow", "detached", "value", "class", "medusa"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("losses")
    state_losses.prepare(made)
    return made


@pytest.fixture(scope="module")
def truths(folder: Path) -> dict[str, Truth]:
    """By the folder that their gradients are saved in."""
    found = {
        "gradients": state_losses.by_transformers(folder),
        "per_token": state_losses.by_transformers(folder, per_token=True),
        "alone": state_losses.by_transformers(folder, language_model=0.0),
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
        assert found.values == pytest.approx(truths[case.truth].values, rel=BOUND)
        seen |= {name.partition("state_heads.")[2].split(".")[0] for name in found.errors if "state_heads" in name}
    assert seen == HEADS


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
    truth = state_losses.by_transformers(tmp_path)
    state_losses.save_gradients(tmp_path / "gradients", truth)
    cases = [Case(topology=Topology(pp=2), settings=RECOMPUTE["uniform2"])]
    for case, *ranks in zip(cases, *start_ranks(2, state_losses.run, tmp_path, cases), strict=True):
        check(case, ranks, {"gradients": truth})


def test_nemo_trainer(start_ranks: Start, folder: Path, truths: dict[str, Truth], tmp_path: Path) -> None:
    checkpoint, uniform = tmp_path / "checkpoint", RECOMPUTE["uniform2"]
    runs = [
        # first: NeMo 2.7.3 changes the class of a model that it trains, and subclasses made afterwards recurse
        # (lightning/megatron_parallel.py:902)
        Run(topology=Topology(tp=2, sp=True), alone=True, truth="alone"),
        Run(topology=Topology(pp=2, vp=2), settings=uniform, save=checkpoint),
        Run(topology=Topology(cp=2), truth="per_token", settings={"calculate_per_token_loss": True}),
        Run(topology=Topology(dp=2), settings=uniform),
        Run(topology=Topology(tp=2), resume=checkpoint, steps=2, truth=""),
    ]
    by_run = list(zip(*start_ranks(2, state_loss_trainer.train, folder, runs), strict=True))
    for run, ranks in zip(runs[:-1], by_run, strict=False):
        check(run, list(ranks), truths)
    weights = {"early": 0.5, "probe": 2.0, "class": 3.0}
    total = sum(weights.get(name, 1.0) * value for name, value in truths["alone"].values.items())
    assert by_run[0][0].logged["reduced_train_loss"] == pytest.approx(total, rel=BOUND)

    saved = whole_weights(by_run[1])
    resumed = whole_weights([replace(rank, pieces=rank.first) for rank in by_run[-1]])
    assert {name.split(".")[1] for name in saved if name.startswith("state_heads.")} == HEADS
    assert saved.keys() == resumed.keys() and all(np.array_equal(saved[name], resumed[name]) for name in saved)
    assert by_run[-1][0].logged["global_step"] == 1


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
        truth = state_losses.by_transformers(folder, weights=merged(begun))
        expected = {name: g.numpy() for name, g in truth.gradients.items() if name.startswith("state_heads.")}
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
    runs = [Run(topology=Topology(), lora="nemos")]
    with pytest.raises(
        ConfigError, match=r"`peft` must leave the heads of losses to be trained, as `training\.lora\.LoRA`"
    ):
        start_ranks(1, state_loss_trainer.train, folder, runs)
    virtual = [Run(topology=Topology(pp=2, vp=2), lora="ours")]
    with pytest.raises(ConfigError, match=r"`virtual_pipeline_model_parallel_size` must be None with a LoRA"):
        start_ranks(2, state_loss_trainer.train, folder, virtual)


def test_heads_begin_the_same_on_every_layout_and_draw_no_random_numbers(start_ranks: Start, folder: Path) -> None:
    ((alone, untouched),) = start_ranks(1, state_losses.new_heads, folder, Topology())
    halves = start_ranks(2, state_losses.new_heads, folder, Topology(tp=2))
    assert untouched and all(untouched for _, untouched in halves)
    for name, whole in alone.items():
        parts = [half[name] for half, _ in halves]
        assert np.array_equal(np.concatenate(parts) if "output" in name else parts[0], whole)
        assert np.array_equal(parts[0], parts[1]) or "output" in name


def test_what_is_not_trained_cannot_be_recomputed(start_ranks: Start, folder: Path, truths: dict[str, Truth]) -> None:
    frozen = Case(topology=Topology(), settings=RECOMPUTE["uniform1"], freeze=True, only=("detached", "value"))
    ((found,),) = start_ranks(1, state_losses.run, folder, [frozen])
    assert "loss detached must be computed, and its gradient started, once for each of 4 microbatches" in found.error
    assert "computed 0 times and started 0" in found.error


@pytest.mark.parametrize("tp", [1, 2])
def test_sequence_classifier_of_transformers(tp: int, start_ranks: Start, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    save_tiny(tmp_path / "causal", Tiny(layers=3, groups=2, tied=True), vocab_size=state_losses.VOCAB)
    config = Qwen2Config.from_pretrained(tmp_path / "causal", num_labels=3, pad_token_id=0)
    reference = Qwen2ForSequenceClassification.from_pretrained(tmp_path / "causal", config=config, dtype=torch.float32)
    with torch.no_grad():
        reference.score.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    reference.save_pretrained(tmp_path / "classifier")
    ids = torch.randint(1, state_losses.VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[0, 7:], ids[1, 3:] = 0, 0  # padding
    labels = torch.tensor([2, 0, 1])
    given = reference.double()(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
    given.loss.backward()
    (tmp_path / "gradients").mkdir()
    (tmp_path / "gradients" / "config.json").write_text((tmp_path / "classifier" / "config.json").read_text())
    save_file(
        {name: p.grad.float().contiguous() for name, p in reference.named_parameters()},
        tmp_path / "gradients" / "model.safetensors",
    )
    for loss, logits, errors in start_ranks(tp, state_losses.classified, tmp_path, Topology(tp=tp), ids, labels):
        assert loss == pytest.approx(given.loss.item(), rel=BOUND)
        np.testing.assert_allclose(logits, given.logits.detach().numpy(), rtol=BOUND, atol=1e-6)
        assert len(errors) > 20 and max(errors.values()) <= BOUND


def _classifier(**arguments: Any) -> Any:
    from nemo_qwen_hidden.training.losses import SequenceClassifier

    return SequenceClassifier(**{"name": "class", "classes": 2, "last": "last"} | arguments)


def test_settings_of_losses_are_checked(tmp_path: Path) -> None:
    from nemo_qwen_hidden.training.losses import Distillation, LinearProbe

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
    from nemo_qwen_hidden.training.losses import Tokens

    place, ids = Topology(tp=2, sp=True, cp=2).at(1), torch.arange(8).expand(2, -1)
    with pytest.raises(ConfigError, match="`batch` must be padded"):
        Tokens.at(HookPoint("embed"), place, {"tokens": ids, "cu_seqlens": torch.zeros(2)})
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
    from nemo_qwen_hidden.training.attach import AttachedLosses

    usual = {"cuda_graph_impl": "none", "fp8": None, "recompute_granularity": None, "num_layers": 4}
    chunk: Any = SimpleNamespace(config=SimpleNamespace(**usual | settings))
    with pytest.raises(HiddenStatesError, match=said):
        AttachedLosses([chunk], (), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="names of losses on states` must differ"):
        AttachedLosses([chunk], (_classifier(), _classifier()), None)  # type: ignore[arg-type]
