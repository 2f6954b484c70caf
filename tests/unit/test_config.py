"""Settings: their defaults, and what ``check`` finds in them alone."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from nemo_qwen_hidden.config import BYTES, DTYPES, PrecisionSettings, Settings, check
from nemo_qwen_hidden.errors import ConfigErrors, UserError


def settings(group: str, **values: Any) -> Settings:
    default = Settings()
    return replace(default, **{group: replace(getattr(default, group), **values)})


def test_defaults_are_valid_and_run_the_embedded_model_on_the_embedded_text() -> None:
    default = Settings()
    check(default)
    assert (default.model.path, default.data.path, default.store.path) == (None, None, None)
    assert default.capture.hook_points == ("all",)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().parallel.tp = 2  # type: ignore[misc]


def test_the_stored_dtype_is_the_compute_dtype_unless_chosen() -> None:
    assert settings("precision", compute="bf16").stored_dtype == "bf16"
    assert settings("precision", compute="fp32", stored="fp16").stored_dtype == "fp16"


def test_every_dtype_has_its_size() -> None:
    assert {name: BYTES[name] for name in DTYPES} == {"fp32": 4, "bf16": 2, "fp16": 2}


NEEDS_TP = "splits the sequence over the tp axis and needs `parallel.tp` of 2 or more"


@pytest.mark.parametrize(
    ("group", "values", "sentence"),
    [
        ("precision", {"compute": "fp8"}, "`precision.compute` must be one of fp32, bf16, fp16, but is 'fp8' instead."),
        (
            "precision",
            {"stored": "int4"},
            "`precision.stored` must be one of fp32, bf16, fp16, int8, but is 'int4' instead.",
        ),
        (
            "precision",
            {"nonfinite": "drop"},
            "`precision.nonfinite` must be one of refuse, keep, but is 'drop' instead.",
        ),
        ("store", {"add": "rows"}, "`store.add` must be one of hook_points, documents, but is 'rows' instead."),
        ("store", {"commit_secs": -1.0}, "`store.commit_secs` must be at least 0, but is -1.0 instead."),
        ("capture", {"gather": "all"}, "`capture.gather` must be one of none, rank0, but is 'all' instead."),
        ("data", {"max_tokens": 0}, "`data.max_tokens` must be at least 1, but is 0 instead."),
        ("data", {"batch_tokens": -1}, "`data.batch_tokens` must be at least 1, but is -1 instead."),
        ("store", {"shard_rows": 0}, "`store.shard_rows` must be at least 1, but is 0 instead."),
        ("runtime", {"threads": 0}, "`runtime.threads` must be at least 1, but is 0 instead."),
        ("parallel", {"tp": 0}, "`parallel.tp` must be at least 1, but is 0 instead."),
        ("parallel", {"pp": -2}, "`parallel.pp` must be at least 1, but is -2 instead."),
        ("parallel", {"dp": 0}, "`parallel.dp` must be at least 1, but is 0 instead."),
        ("parallel", {"sp": True}, f"`parallel.sp` {NEEDS_TP}, but is True instead."),
    ],
)
def test_one_problem(group: str, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        check(settings(group, **values))
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("data", {"max_tokens": 1, "batch_tokens": 1}),
        ("store", {"shard_rows": 1}),
        ("runtime", {"threads": 1}),
        ("parallel", {"tp": 2, "sp": True, "dp": 3}),
        ("capture", {"gather": "rank0"}),
        *(("precision", {"compute": dtype, "stored": dtype}) for dtype in DTYPES),
    ],
)
def test_what_is_allowed(group: str, values: dict[str, Any]) -> None:
    check(settings(group, **values))


def test_every_problem_is_told_at_once() -> None:
    wrong = replace(settings("data", max_tokens=0), precision=PrecisionSettings(compute="fp64"))
    with pytest.raises(ConfigErrors) as refused:
        check(wrong)
    assert [problem.setting for problem in refused.value.problems] == ["precision.compute", "data.max_tokens"]
