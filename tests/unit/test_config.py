"""Settings: their defaults, and what ``check`` finds in them alone."""

from dataclasses import FrozenInstanceError, replace
from math import nan
from typing import Any

import pytest

from nemo_qwen_hidden.config import BYTES, DTYPES, PrecisionSettings, Settings, TokenSettings, check, check_tokens
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


GIVEN = "must be given where `tokens.keep` is {}, and only there"
SLICES = (
    '`tokens.spans` must hold slices `start:stop` of positions, such as "0:4" or "-3:", in YAML in quotes, '
    "but is {!r} instead."
)
EMPTY = "`tokens.spans` must hold slices with a position in them, but is {!r} instead."
BAD_SLICES = ("", "4", "90", "0:4:2", "a:b", "0.5:2", " 0:4", "--1:", "\u0664:")
EMPTY_SLICES = ("4:4", "5:2", "-2:-2", "-1:-3", ":0", "-3:0", "0:0")
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
        (
            "capture",
            {"most_attention_gb": float("nan")},
            "`capture.most_attention_gb` must be at least 0, but is nan instead.",
        ),
        ("capture", {"gather": "all"}, "`capture.gather` must be one of none, rank0, but is 'all' instead."),
        ("data", {"max_tokens": 0}, "`data.max_tokens` must be at least 1, but is 0 instead."),
        ("data", {"batch_tokens": -1}, "`data.batch_tokens` must be at least 1, but is -1 instead."),
        ("store", {"shard_rows": 0}, "`store.shard_rows` must be at least 1, but is 0 instead."),
        (
            "tokens",
            {"keep": "some"},
            "`tokens.keep` must be one of all, last, spans, mask, assistant, but is 'some' instead.",
        ),
        (
            "tokens",
            {"pool": "max"},
            "`tokens.pool` must be one of none, last, mean, weighted_mean, but is 'max' instead.",
        ),
        ("tokens", {"every": 0}, "`tokens.every` must be at least 1, but is 0 instead."),
        ("tokens", {"sample": 0}, "`tokens.sample` must be at least 1, but is 0 instead."),
        (
            "tokens",
            {"sample": 1, "sample_of": "rows"},
            "`tokens.sample_of` must be one of document, all, but is 'rows' instead.",
        ),
        (
            "tokens",
            {"sample_of": "all"},
            "`tokens.sample_of` must be document where `tokens.sample` gives no number of tokens to draw, "
            "but is 'all' instead.",
        ),
        ("tokens", {"seed": -1}, "`tokens.seed` must be from 0 to 2**64 - 1, but is -1 instead."),
        ("tokens", {"seed": 2**64}, f"`tokens.seed` must be from 0 to 2**64 - 1, but is {2**64} instead."),
        ("tokens", {"keep": "spans"}, f"`tokens.spans` {GIVEN.format('spans')}, but is () instead."),
        ("tokens", {"spans": ("0:4",)}, f"`tokens.spans` {GIVEN.format('spans')}, but is ('0:4',) instead."),
        ("tokens", {"keep": "mask"}, f"`tokens.mask_field` {GIVEN.format('mask')}, but is None instead."),
        ("tokens", {"mask_field": "m"}, f"`tokens.mask_field` {GIVEN.format('mask')}, but is 'm' instead."),
        *(("tokens", {"keep": "spans", "spans": (":", span)}, SLICES.format(span)) for span in BAD_SLICES),
        *(("tokens", {"keep": "spans", "spans": (span,)}, EMPTY.format(span)) for span in EMPTY_SLICES),
        *(
            ("tokens", {"max_norm": bad}, f"`tokens.max_norm` must be a number above 0, but is {bad} instead.")
            for bad in (0.0, -1.0, float("nan"), float("inf"))
        ),
        (
            "tokens",
            {"max_norm": 2.0, "pool": "mean"},
            "`tokens.max_norm` must be null where `tokens.pool` makes one vector of a document's kept tokens, "
            "but is 2.0 instead.",
        ),
        (
            "tokens",
            {"max_norm_at": "embed"},
            "`tokens.max_norm_at` must be null where `tokens.max_norm` leaves nothing out, but is 'embed' instead.",
        ),
        ("runtime", {"threads": 0}, "`runtime.threads` must be at least 1, but is 0 instead."),
        ("parallel", {"tp": 0}, "`parallel.tp` must be at least 1, but is 0 instead."),
        ("parallel", {"pp": -2}, "`parallel.pp` must be at least 1, but is -2 instead."),
        ("parallel", {"dp": 0}, "`parallel.dp` must be at least 1, but is 0 instead."),
        (
            "parallel",
            {"auto": True, "pp": 2},
            "`parallel.pp` must be left out where `parallel.auto` chooses the layout, but is 2 instead.",
        ),
        ("parallel", {"auto": True, "memory_gb": 0.0}, "`parallel.memory_gb` must be above 0, but is 0.0 instead."),
        ("parallel", {"auto": True, "memory_gb": nan}, "`parallel.memory_gb` must be above 0, but is nan instead."),
        (
            "parallel",
            {"memory_gb": 8.0},
            "`parallel.memory_gb` must be left out where `parallel.auto` is false, but is 8.0 instead.",
        ),
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
        ("parallel", {"auto": True, "memory_gb": 0.5}),
        ("capture", {"gather": "rank0"}),
        ("tokens", {"keep": "spans", "spans": (":", "0:4", "-3:", ":-1", "2:-2", "-9:4")}),
        ("tokens", {"keep": "mask", "mask_field": "m", "every": 3, "special": False, "first": False, "pool": "mean"}),
        ("tokens", {"keep": "assistant", "sample": 3, "sample_of": "all", "seed": 2**64 - 1}),
        ("tokens", {"max_norm": 0.5, "max_norm_at": "resid_post@-1", "keep": "last"}),
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


def test_slices_are_those_of_python() -> None:
    tokens = TokenSettings(keep="spans", spans=("0:4", "-3:", ":-1", ":"))
    check_tokens(tokens)
    assert tokens.slices == (slice(0, 4), slice(-3, None), slice(None, -1), slice(None))
    with pytest.raises(ConfigErrors) as refused:
        check_tokens(replace(tokens, spans=("x",), every=0, max_norm_at="embed"))
    settings_named = [problem.setting for problem in refused.value.problems]
    assert settings_named == ["tokens.every", "tokens.spans", "tokens.max_norm_at"]
