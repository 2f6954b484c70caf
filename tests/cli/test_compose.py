"""Settings from the command line: what is taken, and the sentence for everything that is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_qwen_hidden.cli import known
from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.config import ParallelSettings, PrecisionSettings, Settings, check
from nemo_qwen_hidden.errors import ConfigError, ConfigErrors

ROOT = Path(__file__).parents[2]


def test_the_keys_are_these() -> None:
    """A new key is a deliberate edit of this list, of conf/ and of config.py."""
    assert list(known.kinds()) == [
        "model.path",
        "model.adapter",
        "model.tokenizer",
        "parallel.tp",
        "parallel.pp",
        "parallel.vp",
        "parallel.cp",
        "parallel.dp",
        "parallel.sp",
        "parallel.first_stage_layers",
        "parallel.last_stage_layers",
        "parallel.account_for_embedding",
        "parallel.account_for_loss",
        "parallel.pipeline_layout",
        "parallel.auto",
        "parallel.memory_gb",
        "capture.hook_points",
        "capture.gather",
        "capture.heads",
        "capture.most_attention_gb",
        "precision.compute",
        "precision.stored",
        "precision.nonfinite",
        "data.path",
        "data.max_tokens",
        "data.batch_tokens",
        "data.packing",
        "data.text_field",
        "data.messages_field",
        "data.id_field",
        "tokens.keep",
        "tokens.every",
        "tokens.spans",
        "tokens.mask_field",
        "tokens.special",
        "tokens.first",
        "tokens.sample",
        "tokens.sample_of",
        "tokens.seed",
        "tokens.pool",
        "tokens.max_norm",
        "tokens.max_norm_at",
        "store.path",
        "store.shard_rows",
        "store.overwrite",
        "store.add",
        "store.commit_secs",
        "runtime.threads",
        "profile.trace",
    ]


def test_the_presets_are_these() -> None:
    assert {group: known.presets(group) for group in known.groups()} == {
        "model": ("default",),
        "parallel": (
            "auto",
            "cp2",
            "default",
            "dp2",
            "pp2",
            "pp2_vp2",
            "single",
            "tp2",
            "tp2_cp2_sp",
            "tp2_pp2",
            "tp2_pp2_sp",
            "tp2_sp",
        ),
        "capture": ("default", "embedding", "every_fourth", "everything", "last"),
        "precision": ("bf16", "default", "fp32", "fp32_stored_bf16", "fp32_stored_int8"),
        "data": ("default",),
        "tokens": ("assistant", "default", "last", "mean", "ordinary", "weighted_mean"),
        "store": ("default",),
        "runtime": ("default",),
        "profile": ("default",),
    }


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert compose([]) == Settings()


PRESETS = [f"{group}={name}" for group in known.groups() for name in known.presets(group) if name != "default"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_is_valid(preset: str) -> None:
    check(compose([preset]))


def test_a_preset_takes_its_group_and_keys_win_over_it() -> None:
    settings = compose(["parallel.pp=3", "parallel=tp2_pp2", "precision=fp32_stored_bf16"])
    assert settings.parallel == ParallelSettings(tp=2, pp=3)
    assert settings.precision == PrecisionSettings(compute="fp32", stored="bf16")


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("all", ("all",)),
        ("resid_post@3", ("resid_post@3",)),
        ("resid_post@-1", ("resid_post@-1",)),
        ("resid_post@0:24:6", ("resid_post@0:24:6",)),
        ("[embed,resid_post@::4,resid_post@-1]", ("embed", "resid_post@::4", "resid_post@-1")),
        ("['resid_post@3', \"final_norm\"]", ("resid_post@3", "final_norm")),
        ("[]", ()),
    ],
)
def test_hook_points_are_a_list_or_one_text(text: str, points: tuple[str, ...]) -> None:
    assert compose([f"capture.hook_points={text}"]).capture.hook_points == points


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("out/run-1", "out/run-1"),
        ("2024_01", "2024_01"),
        ("007", "007"),
        ("1e3", "1e3"),
        ("true", "true"),
        ("notes (1), final.txt", "notes (1), final.txt"),
        ("~/données/[ab]*.txt", "~/données/[ab]*.txt"),
        ("docs/**/*.md", "docs/**/*.md"),
        ("a=b", "a=b"),
        ('"it\'s"', "it's"),
        ("out/tp${parallel.tp}", "out/tp1"),
        ("null", None),
    ],
)
def test_a_text_setting_takes_what_the_shell_gave(text: str, path: str | None) -> None:
    assert compose([f"store.path={text}"]).store.path == path


def test_the_last_of_two_values_counts() -> None:
    assert compose(["data.max_tokens=3", "data.max_tokens=1_024"]).data.max_tokens == 1024


UNKNOWN = "must be one of the known settings"
TYPED = "must be set as `key=value`, without `+`, `~` or `@`"
ONE = "must be one value; a list stands in [brackets], text with a comma in quotes"
UNREADABLE = "must be readable by Hydra: text that holds brackets or quotes stands in quotes"
LIST = "must be a list of texts, such as [embed,all]"
LAYOUTS = "must be one of the presets " + ", ".join(known.presets("parallel"))
ABSENT = "KeyError raised while resolving interpolation: \"Environment variable 'NQH_NOT' not found\""


@pytest.mark.parametrize(
    ("text", "setting", "rule", "value"),
    [
        ("parallel.tpp=2", "parallel.tpp", f"{UNKNOWN} (did you mean `parallel.tp`?)", "parallel.tpp=2"),
        ("+parallel.tpp=2", "parallel.tpp", f"{UNKNOWN} (did you mean `parallel.tp`?)", "+parallel.tpp=2"),
        ("tp=2", "tp", f"{UNKNOWN} (did you mean `parallel.tp`?)", "tp=2"),
        ("parallel.tp.x=2", "parallel.tp.x", f"{UNKNOWN} (did you mean `parallel.tp`?)", "parallel.tp.x=2"),
        ("paralel=tp2", "paralel", f"{UNKNOWN} (did you mean `parallel`?)", "paralel=tp2"),
        ("capture.hookpoints=all", "capture.hookpoints", f"{UNKNOWN} (did you mean `capture.hook_points`?)", None),
        ("hydra.run.dir=x", "hydra.run.dir", f"{UNKNOWN} (`--settings` lists them)", None),
        ("seed=1", "seed", f"{UNKNOWN} (did you mean `tokens.seed`?)", "seed=1"),
        ("colour=1", "colour", f"{UNKNOWN} (`--settings` lists them)", "colour=1"),
        ("parallel.tp=two", "parallel.tp", "must be a whole number", "two"),
        ("parallel.tp=2.0", "parallel.tp", "must be a whole number", 2.0),
        ("parallel.tp=true", "parallel.tp", "must be a whole number", True),
        ("parallel.tp=null", "parallel.tp", "must be a whole number", None),
        ("parallel.tp=", "parallel.tp", "must be a whole number", ""),
        ("parallel.tp=[2]", "parallel.tp", "must be a whole number", [2]),
        ("tokens.max_norm=ten", "tokens.max_norm", "must be a number", "ten"),
        ("store.commit_secs=soon", "store.commit_secs", "must be a number", "soon"),
        ("parallel.memory_gb=[8]", "parallel.memory_gb", "must be a number", [8]),
        ("parallel.sp=maybe", "parallel.sp", "must be true or false", "maybe"),
        ("data.text_field=null", "data.text_field", "must be text", None),
        ("store.path=[a,b]", "store.path", "must be text", ["a", "b"]),
        ("model.path=", "model.path", "must not be empty", ""),
        ("store.path=${oc.env:NQH_NOT}", "store.path", f"must have a value ({ABSENT})", "${oc.env:NQH_NOT}"),
        ("store.path=???", "store.path", "must have a value (Missing mandatory value: store.path)", "???"),
        ("capture.hook_points=3", "capture.hook_points", LIST, 3),
        ("capture.hook_points=null", "capture.hook_points", LIST, None),
        ("capture.hook_points=embed,all", "capture.hook_points", ONE, "embed,all"),
        ("capture.hook_points={a:1}", "capture.hook_points", ONE, "{a:1}"),
        ("parallel.tp=1,2", "parallel.tp", ONE, "1,2"),
        ("parallel.tp=range(1,4)", "parallel.tp", ONE, "range(1,4)"),
        ("parallel=tp3", "parallel", LAYOUTS, "tp3"),
        ("parallel=[tp2]", "parallel", LAYOUTS, "[tp2]"),
        ("parallel={tp:2}", "parallel", LAYOUTS, "{tp:2}"),
        ("parallel=tp2,pp2", "parallel", LAYOUTS, "tp2,pp2"),
        ("parallel=null", "parallel", LAYOUTS, "null"),
        ("+parallel.tp=2", "parallel.tp", TYPED, "+parallel.tp=2"),
        ("++parallel.tp=2", "parallel.tp", TYPED, "++parallel.tp=2"),
        ("+parallel=tp2", "parallel", TYPED, "+parallel=tp2"),
        ("~parallel.tp", "parallel.tp", TYPED, "~parallel.tp"),
        ("parallel@model=tp2", "parallel", TYPED, "parallel@model=tp2"),
        ("parallel.tp", "parallel.tp", "must be written `key=value`", "parallel.tp"),
        ("--tp", "--tp", "must be written `key=value`", "--tp"),
        ("", "override", "must be written `key=value`", ""),
        ("=2", "=2", f"{UNKNOWN} (`--settings` lists them)", "=2"),
        ("parallel.tp=(2", "parallel.tp", UNREADABLE, "(2"),
        ("capture.hook_points=[embed", "capture.hook_points", UNREADABLE, "[embed"),
        ("data.path='unclosed", "data.path", UNREADABLE, "'unclosed"),
    ],
)
def test_what_is_refused_and_how(text: str, setting: str, rule: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([text])
    problem = refused.value
    expected = text if value is None and rule.startswith(UNKNOWN) else value
    assert (problem.setting, problem.rule, problem.value) == (setting, rule, expected)
    assert str(problem) == f"`{setting}` {rule}, but is {expected!r} instead."


@pytest.mark.parametrize(
    "texts",
    [["parallel.tpp=2", "data.path"], ["parallel.tp=two", "parallel.sp=maybe"]],
)
def test_every_problem_is_told_at_once(texts: list[str]) -> None:
    with pytest.raises(ConfigErrors) as refused:
        compose(texts)
    assert len(refused.value.problems) == 2
    assert len(str(refused.value).splitlines()) == 2


def test_a_refusal_imports_neither_torch_nor_nemo() -> None:
    program = """
import sys
from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.errors import ConfigError
try:
    compose(["parallel.tpp=2"])
except ConfigError:
    print(sorted({"torch", "nemo", "megatron", "lightning", "transformers", "numpy"} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n", ran.stderr
