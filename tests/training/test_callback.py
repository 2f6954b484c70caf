"""``HiddenStatesCallback`` as NeMo's recipes and checkpoints hold it, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.parallel.launch import Rank
from tests.conftest import Start
from tests.support.models import Tiny, save_tiny
from tests.support.training import VOCAB, Job

ARGUMENTS: dict[str, Any] = {
    "hook_points": ["resid_post@0", "final_norm"],
    "to": "states",
    "every": 10,
    "phases": ["train", "validation"],
    "samples": [0, 5],
    "dtype": "bf16",
}


def in_nemos_hands(rank: Rank) -> list[dict[str, Any]]:
    """Arguments of callbacks that NeMo and NeMo-Run have made anew."""
    import fiddle as fdl
    import nemo_run as run
    from nemo.lightning import Trainer, io
    from nemo.lightning.io.mixin import serialization

    import nemo_qwen_hidden

    kind = nemo_qwen_hidden.HiddenStatesCallback
    recipe = run.Partial(Trainer, callbacks=[])
    recipe.callbacks.append(run.Config(kind, **ARGUMENTS))
    (from_recipe,) = fdl.build(recipe).keywords["callbacks"]
    again = io.reinit(from_recipe)
    from_checkpoint = fdl.build(serialization.load_json(serialization.dump_json(again.__io__)))
    assert all(type(each) is kind for each in (from_recipe, again, from_checkpoint))
    not_plain = kind(hook_points=("embed",), to=Path("states"), steps=range(0, 30, 10), samples=range(2)).__io__
    kept = fdl.ordered_arguments(serialization.load_json(serialization.dump_json(not_plain)))
    assert kept == {"hook_points": ("embed",), "to": "states", "steps": [0, 10, 20], "samples": [0, 1]}
    return [dict(fdl.ordered_arguments(each.__io__)) for each in (from_recipe, again, from_checkpoint)]


def test_one_line_in_a_recipe_and_nemos_io(start_ranks: Start) -> None:
    (found,) = start_ranks(1, in_nemos_hands)
    assert found == [ARGUMENTS] * 3


def captures(rank: Rank) -> list[bool]:
    """Whether it captures the validation after a step that the store has, and after another one."""
    from nemo_qwen_hidden.training.watch.callback import HiddenStatesCallback

    callback = HiddenStatesCallback(**ARGUMENTS | {"every": 2})
    taken = []
    for number in (4, 6):
        recorder = SimpleNamespace(found=lambda phase, step: (phase, step) == ("validation", 4))
        callback._fit = fit = mock.Mock(recorder=recorder, gathered=None, noted=None)
        trainer = SimpleNamespace(training=False, validating=True, global_step=number)
        data = iter(())
        with mock.patch("nemo_qwen_hidden.training.watch.callback.dataclasses.replace") as replaced:
            callback.on_megatron_step_start(SimpleNamespace(trainer=trainer, data=data))
        taken.append(replaced.called and fit.noted is not None)
    return taken


def test_a_validation_that_the_store_has_is_not_captured_again(start_ranks: Start) -> None:
    """Lightning's loop does one again where it resumes from a checkpoint before it."""
    assert start_ranks(1, captures) == [[False, True]]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dtype": ({"dtype": "fp64"}, {}, "`dtype` must be one of fp32, bf16, fp16, int8, or None, but is 'fp64' instead."),
    "function": ({"dtype": "int8", "to": print}, {}, "`dtype` must be one of fp32, bf16, fp16, or None"),
    "folder": ({"to": None}, {}, "`to` must be a folder, or a function, but is None instead."),
    "lengths": ({"lengths": [3]}, {}, "`lengths` must be a function of a batch, or None, but is [3] instead."),
    "schedule": ({"every": 0}, {}, "`every` must be a whole number of steps"),
    "layer": ({"hook_points": "resid_post@9"}, {}, "must name a layer from 0 to 2"),
    "attention": ({"hook_points": "attn_weights@0"}, {}, "must leave out attn_weights in training"),
    "graphs": ({}, {"model": {"enable_cuda_graph": True}}, "CUDA graphs, which bypass hooks"),
    "accumulation": ({}, {"trainer": {"accumulate_grad_batches": 2}}, "`accumulate_grad_batches` must be 1"),
}


REFUSED_PROBES: dict[str, tuple[Any, str]] = {
    "max_tokens": ("5", "`max_tokens` must be a whole number of at least 1, but is '5' instead."),
    "batch_tokens": (0, "`batch_tokens` must be a whole number of at least 1"),
    "to": (None, "`to` must be a path, but is None instead."),
    "documents": (["a.jsonl"], "`documents` must be a path, but is ['a.jsonl'] instead."),
    "tokens": ("last", "`tokens` must be `config.TokenSettings`, or None, but is 'last' instead."),
    "nonfinite": ("x", "`nonfinite` must be one of refuse, keep"),
}


def refused_probes(_: Rank) -> dict[str, str]:
    from nemo_qwen_hidden.training.watch.probe_set import ProbeSetCallback

    found = {}
    for name, (value, _) in REFUSED_PROBES.items():
        try:
            ProbeSetCallback(**{"hook_points": "all", "to": "store", "every": 1, name: value})
        except ConfigError as error:
            found[name] = str(error)
    return found


def test_a_probe_set_that_cannot_be_is_refused(start_ranks: Start) -> None:
    (found,) = start_ranks(1, refused_probes)
    assert found.keys() == REFUSED_PROBES.keys()
    for name, (_, said) in REFUSED_PROBES.items():
        assert said in found[name]


def refusals(rank: Rank, folder: Path, to: Path) -> dict[str, str]:
    from nemo_qwen_hidden.errors import HiddenStatesError
    from nemo_qwen_hidden.training.chunks import live_chunks
    from nemo_qwen_hidden.training.watch.callback import HiddenStatesCallback
    from tests.support.training import trainer_of

    found = {}
    for name, (arguments, changes, _) in REFUSED.items():
        job = Job(steps=1, **{key: value for key, value in changes.items() if key == "trainer"})
        try:
            callback = HiddenStatesCallback(**{"hook_points": "all", "to": to, **arguments})
            with trainer_of(rank, job, folder, [_setting(changes.get("model", {}), live_chunks), callback]) as given:
                trainer, model, data = given
                trainer.fit(model, data)
        except HiddenStatesError as error:
            found[name] = str(error)
    return found


def _setting(values: dict[str, Any], live_chunks: Any) -> Any:
    """Sets what a model has that was made for it."""
    import lightning.pytorch as pl

    class Setting(pl.Callback):
        def on_fit_start(self, trainer: Any, *_: Any) -> None:
            for name, value in values.items():
                setattr(live_chunks(trainer)[0].config, name, value)

    return Setting()


def test_what_cannot_be_captured_is_refused(tmp_path: Path, start_ranks: Start) -> None:
    folder = save_tiny(tmp_path / "model", Tiny(layers=3, groups=2, tied=True), vocab_size=VOCAB)
    (found,) = start_ranks(1, refusals, folder, tmp_path / "store")
    assert found.keys() == REFUSED.keys()
    for name, (_, _, said) in REFUSED.items():
        assert said in found[name]
    assert not (tmp_path / "store").exists()
