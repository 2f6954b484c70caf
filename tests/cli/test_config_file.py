"""The settings file of --config: where it stands between the defaults and the command line, and what it may not say."""

from pathlib import Path

import pytest

from nemo_qwen_hidden.cli.compose import compose
from nemo_qwen_hidden.config import CaptureSettings, ParallelSettings
from nemo_qwen_hidden.errors import ConfigError, ConfigErrors

RECIPE = """
defaults:
  - parallel: tp2_pp2
  - precision: bf16
parallel:
  sp: true
capture:
  hook_points: resid_post@-1
store: {path: out/run, shard_rows: 100}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return written(tmp_path, RECIPE)


def written(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_presets_and_keys_of_the_file_win_over_the_defaults(recipe: str) -> None:
    settings = compose([], config=recipe)
    assert settings.parallel == ParallelSettings(tp=2, pp=2, sp=True)
    assert settings.capture == CaptureSettings(hook_points=("resid_post@-1",))
    assert (settings.precision.compute, settings.store.path, settings.store.shard_rows) == ("bf16", "out/run", 100)
    assert settings.data == compose([]).data


def test_a_key_of_the_command_line_wins_over_the_file(recipe: str) -> None:
    settings = compose(["parallel.sp=false", "store.path=elsewhere", "capture.hook_points=[embed]"], config=recipe)
    assert settings.parallel == ParallelSettings(tp=2, pp=2, sp=False)
    assert (settings.store.path, settings.store.shard_rows) == ("elsewhere", 100)
    assert settings.capture.hook_points == ("embed",)


def test_a_preset_of_the_command_line_sets_aside_the_file_s_word_on_its_group(recipe: str) -> None:
    settings = compose(["parallel=pp2"], config=recipe)
    assert settings.parallel == ParallelSettings(pp=2)
    assert settings.precision.compute == "bf16"


def test_values_may_refer_to_others_and_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NQH_TEST_OUT", "there")
    path = written(tmp_path, "store: {path: '${oc.env:NQH_TEST_OUT}/tp${parallel.tp}'}")
    assert compose(["parallel.tp=2"], config=path).store.path == "there/tp2"


@pytest.mark.parametrize("text", ["", "# nothing\n", "defaults: []\n"])
def test_a_file_may_say_nothing(tmp_path: Path, text: str) -> None:
    assert compose([], config=written(tmp_path, text)) == compose([])


@pytest.mark.parametrize(
    ("text", "setting", "rule"),
    [
        ("parallel: {tpp: 2}", "parallel.tpp", "must be one of the known settings (did you mean `parallel.tp`?)"),
        ("paralel: {tp: 2}", "paralel", "must be one of the known settings (did you mean `parallel`?)"),
        ("parallel: tp2", "parallel", "must hold settings by key; a preset stands under `defaults`"),
        ("parallel:", "parallel", "must hold settings by key; a preset stands under `defaults`"),
        ("defaults: [parallel]", "defaults", "must be a list of `group: preset`"),
        ("defaults: tp2", "defaults", "must be a list of `group: preset`"),
        ("defaults: [{paralel: tp2}]", "paralel", "must be one of the known settings (did you mean `parallel`?)"),
        ("defaults: [{model: qwen}]", "model", "must be one of the presets default"),
        ("parallel: {tp: two}", "parallel.tp", "must be a whole number"),
        ("parallel: {tp: {x: 1}}", "parallel.tp", "must be a whole number"),
        ("store: {path: 2024_01}", "store.path", "must be text"),
        ("capture: {hook_points: {a: 1}}", "capture.hook_points", "must be a list of texts, such as [embed,all]"),
        ("- parallel", "--config", "must hold settings by key"),
        ("a: [", "--config", "must be valid YAML (line 1: expected the node content, but found '<stream end>')"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, setting: str, rule: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([], config=written(tmp_path, text))
    assert (refused.value.setting, refused.value.rule) == (setting, rule)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model: {path: données}".encode("latin-1"))
    rules = {}
    for path in (tmp_path / "none.yaml", tmp_path, latin):
        with pytest.raises(ConfigError) as refused:
            compose([], config=str(path))
        assert (refused.value.setting, refused.value.value) == ("--config", str(path))
        rules[path.name] = refused.value.rule
    assert rules == {
        "none.yaml": "must be a file that exists",
        tmp_path.name: "must be a readable YAML file (Is a directory)",
        "latin.yaml": "must be a YAML file in UTF-8",
    }


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as refused:
        compose([], config=written(tmp_path, "defaults: [{parallel: tp3}]\nstore: {paths: x}\nseed: 1\n"))
    assert sorted(problem.setting for problem in refused.value.problems) == ["parallel", "seed", "store.paths"]
