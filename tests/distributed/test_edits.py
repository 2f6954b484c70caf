"""Interventions, parts of the model, logits, gradients and chosen tokens, against plain hooks on transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import TINY, VOCAB, Batch, Tiny, ragged_batch

BOUND = 2e-5
TIED = TINY[1]  # 3 layers, 4 heads, 2 query groups
UNTIED = TINY[0]
LAYOUTS = {
    1: [Topology()],
    2: [Topology(tp=2), Topology(tp=2, sp=True), Topology(pp=2), Topology(cp=2), Topology(dp=2)],
    4: [Topology(tp=2, cp=2, sp=True), Topology(pp=2, cp=2), Topology(tp=2, pp=2, sp=True)],
}
HIDDEN = 64
GENERATED = 3


def vector(seed: int) -> torch.Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


def mask_of(batch: Batch) -> torch.Tensor:
    """Every third token."""
    return (torch.arange(batch.input_ids.shape[1]) % 3 == 1).expand(len(batch.lengths), -1)


def patched_states(batch: Batch) -> torch.Tensor:
    size = (*batch.input_ids.shape, HIDDEN)
    return torch.randn(size, generator=torch.Generator().manual_seed(5))


def doubled_at_even(states: torch.Tensor, where: Any) -> torch.Tensor:
    return torch.where((where.position % 2 == 0)[:, None], 2 * states, states)


# name: the edits, and the same as functions of one document's states [tokens, hidden], mask [tokens] and index
def cases(batch: Batch) -> dict[str, list[Any]]:
    from nemo_qwen_hidden.capture import edits

    mask = mask_of(batch)
    return {
        "add": [edits.add("resid_post@0", vector(1), factor=3.0)],
        "add, masked": [edits.add("embed", vector(1), mask=mask)],
        "zero": [edits.zero("mlp_out@1", mask=mask)],
        "mean": [edits.mean("attn_out@1", vector(2))],
        "scale": [edits.scale("resid_mid@1", 0.5, mask=mask)],
        "project out": [edits.project_out("resid_pre@2", vector(3))],
        "patch": [edits.patch("resid_post@1", patched_states(batch), mask=mask)],
        "patch rows": [edits.patch_rows("resid_mid@0", stored_rows(), row_numbers(batch))],
        "function": [edits.apply("final_norm", doubled_at_even)],
        "several": [
            edits.add("resid_pre@1", vector(1)),
            edits.zero("attn_out@2", mask=mask),
            edits.scale("embed", 2.0),
        ],
    }


def stored_rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, HIDDEN)).astype(np.float32)


def row_numbers(batch: Batch) -> torch.Tensor:
    numbers = torch.arange(batch.input_ids.numel()).reshape(batch.input_ids.shape) % 50
    return torch.where(mask_of(batch), numbers, -1)


def same_by_hand(batch: Batch) -> dict[str, list[tuple[str, Callable[[torch.Tensor, int], torch.Tensor]]]]:
    """The edits of ``cases``, written out: hook point, and (states [tokens, hidden], document) to states."""
    mask, patches, unit = mask_of(batch), patched_states(batch), vector(3) / vector(3).norm()
    rows, numbers = torch.from_numpy(stored_rows()), row_numbers(batch)

    def masked(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[torch.Tensor, int], torch.Tensor]:
        return lambda h, i: torch.where(mask[i, : len(h), None], change(h, i), h)

    even = torch.arange(batch.input_ids.shape[1])[:, None] % 2 == 0
    return {
        "add": [("resid_post@0", lambda h, i: h + 3 * vector(1))],
        "add, masked": [("embed", masked(lambda h, i: h + vector(1)))],
        "zero": [("mlp_out@1", masked(lambda h, i: 0 * h))],
        "mean": [("attn_out@1", lambda h, i: vector(2).expand_as(h))],
        "scale": [("resid_mid@1", masked(lambda h, i: h / 2))],
        "project out": [("resid_pre@2", lambda h, i: h - (h * unit).sum(-1, keepdim=True) * unit)],
        "patch": [("resid_post@1", masked(lambda h, i: patches[i, : len(h)]))],
        "patch rows": [("resid_mid@0", masked(lambda h, i: rows[numbers[i, : len(h)]]))],
        "function": [("final_norm", lambda h, i: torch.where(even[: len(h)], 2 * h, h))],
        "several": [
            ("resid_pre@1", lambda h, i: h + vector(1)),
            ("attn_out@2", masked(lambda h, i: 0 * h)),
            ("embed", lambda h, i: 2 * h),
        ],
    }


class Edited:
    """transformers with states replaced by plain hooks; keeps the states that pass, as they go on."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.kept: dict[str, torch.Tensor] = {}
        self.changes: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {}
        self.document = 0
        core = self.model.model
        self._after(core.embed_tokens, "embed")
        self._after(core.norm, "final_norm")
        for index, layer in enumerate(core.layers):
            self._before(layer, f"resid_pre@{index}")
            self._after(layer.self_attn, f"attn_out@{index}")
            self._after(layer.mlp, f"mlp_out@{index}")
            self._after(layer, f"resid_post@{index}")
            if index == 0 or index == 1:
                self._mid(layer, f"resid_mid@{index}")

    def _visit(self, name: str, state: torch.Tensor) -> torch.Tensor:
        if name in self.changes:
            state = self.changes[name](state[0], self.document)[None]
        if state.requires_grad and torch.is_grad_enabled():
            state.retain_grad()
        self.kept[name] = state
        return state

    def _after(self, module: Any, name: str) -> None:
        def hook(_m: Any, _i: Any, output: Any) -> Any:
            rest = output[1:] if isinstance(output, tuple) else None
            state = self._visit(name, output if rest is None else output[0])
            return state if rest is None else (state, *rest)

        module.register_forward_hook(hook)

    def _before(self, module: Any, name: str) -> None:
        def hook(_m: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (self._visit(name, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._visit(name, kwargs["hidden_states"])}

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _mid(self, layer: Any, name: str) -> None:
        """The residual stream between the blocks has no module: attention's output makes up for what is changed."""

        def hook(_m: Any, _i: Any, output: Any) -> Any:
            before = self.kept[name.replace("mid", "pre")]
            mid = before + output[0]
            return (self._visit(name, mid) - before, *output[1:])

        layer.self_attn.register_forward_hook(hook)

    def logits(self, ids: torch.Tensor, document: int) -> torch.Tensor:
        self.document, self.kept = document, {}
        result: torch.Tensor = self.model(ids[None], use_cache=False).logits[0]
        return result


def edited(rank: Rank, layouts: list[Topology], folder: Path, batch: Batch) -> Any:
    """For each layout and case, the logits of all tokens on rank 0."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    found = []
    for number, topology in enumerate(layouts):
        with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous.with_name(f"r{number}")) as groups:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, output_layer=True)
            everything = torch.ones_like(batch.input_ids, dtype=torch.bool)
            logits = {
                name: model.logits(batch.input_ids, lengths=batch.lengths, mask=everything, edits=chosen).numpy()
                for name, chosen in cases(batch).items()
            }
            last = model.logits(batch.input_ids, lengths=batch.lengths, gather="all", packing=False).numpy()
            new = model.generate(batch.input_ids, lengths=batch.lengths, tokens=GENERATED, edits=cases(batch)["add"])
            found.append((logits, last, new))
    return found


@pytest.fixture(scope="module")
def batch() -> Batch:
    return ragged_batch((17, 24, 1, 9))


@pytest.mark.parametrize("world", LAYOUTS)
@pytest.mark.parametrize("tiny", [TIED, UNTIED], ids=lambda tiny: tiny.name)
def test_logits_after_every_edit(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], batch: Batch, world: int, tiny: Tiny
) -> None:
    folder = tiny_folders[tiny]
    everyone = start_ranks(world, edited, LAYOUTS[world], folder, batch)
    by_hand, theirs = same_by_hand(batch), Edited(folder)
    documents = [ids[:length] for ids, length in zip(batch.input_ids, batch.lengths, strict=True)]
    for topology, (logits, last, new) in zip(LAYOUTS[world], everyone[0], strict=True):
        for name, changes in by_hand.items():
            theirs.changes = dict(changes)
            with torch.no_grad():
                expected = torch.cat([theirs.logits(ids, index) for index, ids in enumerate(documents)])
            assert logits[name].shape == (sum(batch.lengths), VOCAB - 1)
            _near(logits[name], expected, (str(topology), name))
        theirs.changes = {}
        with torch.no_grad():
            _near(last, torch.stack([theirs.logits(ids, 0)[-1] for ids in documents]), (str(topology), "last"))
            theirs.changes = dict(by_hand["add"])
            assert new == [_greedy(theirs, ids) for ids in documents]
    assert all(each[0][name].shape[0] == 0 for other in everyone[1:] for each in other for name in by_hand)


def _greedy(theirs: Edited, ids: torch.Tensor) -> list[int]:
    new: list[int] = []
    for _ in range(GENERATED):
        new.append(int(theirs.logits(torch.cat([ids, torch.tensor(new, dtype=ids.dtype)]), 0)[-1].argmax()))
    return new


def _near(ours: np.ndarray, theirs: torch.Tensor, what: Any) -> None:
    expected = theirs.detach().double()
    error = float((torch.from_numpy(ours).double() - expected).norm() / expected.norm())
    assert error < BOUND, (what, error)


WANTED = ("embed", "resid_post@0", "attn_out@1", "resid_mid@1", "mlp_out@2", "resid_pre@2", "final_norm")


def metric_of(logits: torch.Tensor) -> torch.Tensor:
    """The difference of two tokens' log-probabilities, over all chosen tokens."""
    found: torch.Tensor = logits.log_softmax(dim=-1)
    return (found[:, 3] - 2 * found[:, 11]).sum()


def differentiated(rank: Rank, layouts: list[Topology], folder: Path, batch: Batch) -> Any:
    """For each layout: metric, gradients of states and of the vectors of two edits, as rank 0 gets them."""
    from nemo_qwen_hidden.capture import edits
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    found = []
    for number, topology in enumerate(layouts):
        with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous.with_name(f"r{number}")) as groups:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, output_layer=True)
            steered, away = vector(1).requires_grad_(), vector(3).requires_grad_()
            chosen = [
                edits.add("resid_post@0", steered, mask=mask_of(batch)),
                edits.scale("embed", 2.0),
                edits.project_out("resid_mid@1", away),
            ]
            result = model.gradients(
                batch.input_ids,
                lengths=batch.lengths,
                mask=mask_of(batch),
                hook_points=WANTED,
                metric=metric_of,
                edits=chosen,
                batch_tokens=24,
            )
            asks = [parameter.requires_grad for parameter in model.parameters()]
            states = {str(point): gradient.numpy() for point, gradient in result.states.items()}
            found.append((result.value, states, [[g.numpy() for g in each] for each in result.edits], all(asks)))
    return found


@pytest.mark.parametrize("world", LAYOUTS)
def test_gradients_of_states_and_of_edits(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], batch: Batch, world: int
) -> None:
    folder, mask, theirs = tiny_folders[TIED], mask_of(batch), Edited(tiny_folders[TIED])
    everyone = start_ranks(world, differentiated, LAYOUTS[world], folder, batch)
    steered, away = vector(1).requires_grad_(), vector(3).requires_grad_()
    theirs.changes = {
        "resid_post@0": lambda h, i: h + mask[i, : len(h), None] * steered,
        "embed": lambda h, i: 2 * h,
        "resid_mid@1": lambda h, i: h - (h * away / away.norm()).sum(-1, keepdim=True) * away / away.norm(),
    }
    value, expected = 0.0, {name: np.zeros((*batch.input_ids.shape, HIDDEN), np.float32) for name in WANTED}
    for index, (ids, length) in enumerate(zip(batch.input_ids, batch.lengths, strict=True)):
        outcome = metric_of(theirs.logits(ids[:length], index)[mask[index, :length]])
        outcome.backward()
        value += outcome.item()
        for name in WANTED:
            expected[name][index, :length] = theirs.kept[name].grad[0]
    for topology, (found, states, vectors, restored) in zip(LAYOUTS[world], everyone[0], strict=True):
        assert restored
        assert abs(found - value) < 1e-4 * abs(value)
        assert set(states) == set(WANTED)
        for name in WANTED:
            _near(states[name], torch.from_numpy(expected[name]), (str(topology), name))
        assert [len(each) for each in vectors] == [1, 0, 1]
        _near(vectors[0][0], steered.grad, (str(topology), "added vector"))
        _near(vectors[2][0], away.grad, (str(topology), "direction"))


def refused(rank: Rank, topology: Topology, folder: Path, batch: Batch) -> dict[str, str]:
    """What each wrong call raises on this rank, and whether the model works as before afterwards."""
    from nemo_qwen_hidden.capture import edits
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    seed, last = torch.zeros(*batch.input_ids.shape, HIDDEN), UNTIED.layers - 1
    at_norm, behind = edits.scale("final_norm", 2.0), edits.scale(f"resid_post@{last}", 2.0)
    states = {"hook_points": [f"resid_post@{last}"]}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "an edit behind the state of its depth": ("hidden_states", {**states, "edits": [at_norm]}),
        "an edit behind the seeds": ("gradients", {"seeds": {"resid_post@0": seed}, "edits": [behind]}),
        "an edit of a layer too many": ("gradients", {"seeds": {"embed": seed}, "edits": [edits.zero("resid_pre@9")]}),
        "a seed of a layer too many": ("gradients", {"seeds": {"resid_post@9": seed}}),
        "a seed that would be broadcast": ("gradients", {"seeds": {"embed": seed[..., :1]}}),
        "seeds of another batch": ("gradients", {"seeds": {"embed": seed[:1]}}),
        "a seed for many states": ("gradients", {"seeds": {"resid_post@:": seed}}),
        "no seeds": ("gradients", {"seeds": {}}),
        "no number": ("gradients", {"metric": lambda logits: logits[:, 0]}),
        "no tensor": ("gradients", {"metric": lambda logits: float(logits.sum())}),
        "a metric that fails": ("gradients", {"metric": lambda logits: 1 / 0}),
        "gradients left on their ranks": ("gradients", {"seeds": {"embed": seed}, "gather": "none"}),
        "logits left on their ranks": ("logits", {"gather": "none"}),
        "heads in another order": ("hidden_states", {"hook_points": ["attn_weights@0"], "heads": [3, 1]}),
        "half a head": ("hidden_states", {"hook_points": ["attn_weights@0"], "heads": [0.5]}),
    }
    found = {}
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, output_layer=True)
        for name, (call, options) in calls.items():
            with pytest.raises(Exception) as raised:
                getattr(model, call)(batch.input_ids, lengths=batch.lengths, **options)
            found[name] = f"{raised.type.__name__}: {raised.value}"
        model.hidden_states(batch.input_ids, lengths=batch.lengths, **states)
        asks = all(parameter.requires_grad for parameter in model.parameters())
    return {**found, "parameters ask for gradients": str(asks)}


def test_what_cannot_be_done_is_said_on_every_rank(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], batch: Batch
) -> None:
    """Where one rank alone noticed, the others would wait for it."""
    first, second = start_ranks(2, refused, Topology(pp=2), tiny_folders[UNTIED], batch)
    of_metric = ("no number", "no tensor", "a metric that fails")
    assert first.pop("parameters ask for gradients") == second.pop("parameters ask for gradients") == "True"
    assert first["a metric that fails"].startswith("ZeroDivisionError")
    for name, said in first.items():
        if name in of_metric:
            assert second[name].startswith("PeerError"), name
        else:
            assert said.startswith("ConfigError") and second[name] == said, name


def continued(rank: Rank, layouts: list[Topology], folder: Path, batch: Batch) -> Any:
    """For each layout, states that are run on from the middle, and those that the whole model gives."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    found = []
    for number, topology in enumerate(layouts):
        with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous.with_name(f"r{number}")) as groups:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups)
            whole = model.hidden_states(
                batch.input_ids, lengths=batch.lengths, hook_points=["embed", "all", "final_norm"], gather="all"
            )
            named = {str(point): states for point, states in whole.items()}
            last = model.config.num_layers
            parts = {}
            for start, stop in ((0, last), (1, 3), (2, 3), (last - 1, last), (0, 1)):
                given = named["embed" if start == 0 else f"resid_post@{start - 1}"]
                points = None if stop < last else [f"resid_post@{stop - 1}", "final_norm"]
                ran = model.run(given, start=start, stop=stop, hook_points=points, lengths=batch.lengths)
                parts[start, stop] = {str(point): states.numpy() for point, states in ran.items()}
            found.append((parts, {name: states.numpy() for name, states in named.items()}))
    return found


@pytest.mark.parametrize("world", [*LAYOUTS, 3])
def test_what_is_stored_can_be_continued_from(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], batch: Batch, world: int
) -> None:
    layouts = {**LAYOUTS, 2: [*LAYOUTS[2], Topology(pp=2, vp=2)], 3: [Topology(pp=3)]}[world]
    everyone = start_ranks(world, continued, layouts, tiny_folders[UNTIED], batch)
    for topology, (parts, whole) in zip(layouts, everyone[0], strict=True):
        for bounds, states in parts.items():
            assert set(states) == {f"resid_post@{bounds[1] - 1}"} | ({"final_norm"} if bounds[1] == 5 else set())
            for name, values in states.items():
                assert np.array_equal(values, whole[name]), (str(topology), bounds, name)


def selected(rank: Rank, layouts: list[Topology], folder: Path, batch: Batch) -> Any:
    """For each layout: everything, chosen tokens, and means of them, at sites of every kind."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    points = ["embed", "resid_mid@1", "z@1", "k@2", "mlp_act@0", "attn_weights@1", "final_norm"]
    found = []
    for number, topology in enumerate(layouts):
        with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous.with_name(f"r{number}")) as groups:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups)
            options: list[dict[str, Any]] = [{}, {"mask": mask_of(batch)}, {"heads": [1, 3]}]
            means = [{"mask": mask_of(batch), "pool": pool} for pool in ("last", "mean", "weighted_mean")]
            poolable = [point for point in points if not point.startswith("attn_weights")]
            options += [{**chosen, "hook_points": poolable} for chosen in (*means, {"pool": "mean"})]
            results = []
            for chosen in options:
                for packing in (True, False):
                    asked = {"hook_points": points, "packing": packing, **chosen}
                    states = model.hidden_states(batch.input_ids, lengths=batch.lengths, **asked)
                    results.append({str(point): values.numpy() for point, values in states.items()})
            found.append(results)
    return found


@pytest.mark.parametrize("world", LAYOUTS)
def test_chosen_tokens_and_means_are_those_of_everything(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], batch: Batch, world: int
) -> None:
    everyone = start_ranks(world, selected, LAYOUTS[world], tiny_folders[TIED], batch)
    mask = mask_of(batch).numpy() & (np.arange(batch.input_ids.shape[1]) < np.array(batch.lengths)[:, None])
    for results in everyone[0]:
        for packed in (0, 1):
            whole, chosen, heads, last, mean, weighted, means = results[packed::2]
            for name, states in whole.items():
                flat = states.reshape(*states.shape[:2], -1)
                kept = np.where(mask[..., None], flat, 0)
                assert np.array_equal(chosen[name].reshape(kept.shape), kept), name
                if name not in means:
                    continue
                for index, length in enumerate(batch.lengths):
                    rows = np.flatnonzero(mask[index])
                    one = {"last": last, "mean": mean, "weighted": weighted}
                    if not len(rows):
                        assert not any(each[name][index].any() for each in one.values())
                        continue
                    np.testing.assert_array_equal(last[name][index].ravel(), flat[index, rows[-1]])
                    weights = (rows + 1) / (rows + 1).sum()
                    _close(mean[name][index], flat[index, rows].astype(np.float64).mean(axis=0))
                    _close(weighted[name][index], weights @ flat[index, rows].astype(np.float64))
                    _close(means[name][index], flat[index, :length].astype(np.float64).mean(axis=0))
            np.testing.assert_array_equal(heads["attn_weights@1"], whole["attn_weights@1"][:, :, [1, 3]])


def _close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours.ravel(), theirs, rtol=1e-5, atol=1e-5 * float(np.abs(theirs).max()))


def copied(rank: Rank, topology: Topology, folder: Path, batch: Batch, masks: list[torch.Tensor | None]) -> list[int]:
    """Bytes of the copies that this rank's hooks make of a residual and of a split site, for each mask."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    found = []
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups)
        for mask in masks:
            states = model.hidden_states(
                batch.input_ids, lengths=batch.lengths, hook_points=["resid_mid@1", "q@1"], mask=mask, gather="none"
            )
            found.append(sum(each.values.nbytes for each in states.values()))
    return found


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2), Topology(tp=2, cp=2, sp=True)], ids=str)
def test_bytes_copied_fall_with_the_tokens_kept(
    start_ranks: Start, tiny_folders: dict[Tiny, Path], topology: Topology
) -> None:
    batch = ragged_batch((64, 64))
    everything = torch.ones(2, 64, dtype=torch.bool)
    eighth = (torch.arange(64) % 8 == 3).expand(2, -1)
    one = torch.arange(64) == torch.tensor([[5], [60]])
    masks = [None, everything, eighth, one]
    ranks = start_ranks(topology.world, copied, topology, tiny_folders[TIED], batch, masks)
    assert np.sum(ranks, axis=0).tolist() == [tokens * (HIDDEN + 64) * 4 for tokens in (128, 128, 16, 2)]


@pytest.mark.parametrize("shape", [(2, 5), (3, 8, HIDDEN), (2, 4, HIDDEN)])
def test_a_patch_needs_states_for_its_mask(shape: tuple[int, ...]) -> None:
    from nemo_qwen_hidden.capture import edits

    with pytest.raises(ConfigError, match="must be of shape"):
        edits.patch("resid_post@0", torch.zeros(shape), mask=torch.ones(2, 5, dtype=torch.bool))


def test_a_patch_without_a_mask_is_of_the_tokens_that_it_has_states_for() -> None:
    from nemo_qwen_hidden.capture import edits

    mask = edits.patch("resid_post@0", torch.zeros(2, 5, HIDDEN)).mask
    assert mask is not None and mask.shape == (2, 5) and mask.all()
