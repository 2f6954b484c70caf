"""Errors: one sentence, what it is about as attributes, and the builtin types that callers expect."""

import pickle

import pytest

from nemo_qwen_hidden.errors import (
    CheckpointError,
    ConfigError,
    ConfigErrors,
    CoverageError,
    DataError,
    HiddenStatesError,
    PeerError,
    RankError,
    StoreError,
    StoreNotFoundError,
    UnsupportedModelError,
    UserError,
    raise_all,
)

TP = ConfigError("parallel.tp", "must divide `num_key_value_heads` (2)", 4)
PATH = DataError("data.path", "must exist", "none.txt")


def test_a_user_s_mistake_is_one_sentence_with_its_parts() -> None:
    assert str(TP) == "`parallel.tp` must divide `num_key_value_heads` (2), but is 4 instead."
    assert (TP.setting, TP.rule, TP.value) == ("parallel.tp", "must divide `num_key_value_heads` (2)", 4)


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (UserError, (HiddenStatesError, ValueError)),
        (ConfigError, (UserError,)),
        (ConfigErrors, (UserError,)),
        (UnsupportedModelError, (UserError, NotImplementedError)),
        (CheckpointError, (UserError,)),
        (DataError, (UserError,)),
        (StoreError, (UserError,)),
        (StoreNotFoundError, (StoreError, FileNotFoundError)),
        (RankError, (HiddenStatesError, RuntimeError)),
        (PeerError, (HiddenStatesError, RuntimeError)),
        (CoverageError, (HiddenStatesError, RuntimeError)),
    ],
)
def test_kinds(error: type[Exception], bases: tuple[type[Exception], ...]) -> None:
    assert all(issubclass(error, base) for base in bases)
    assert issubclass(error, UserError) == (error not in (RankError, PeerError, CoverageError))


def test_a_lost_store_reads_the_same_through_its_builtin_base() -> None:
    error = StoreNotFoundError("store.path", "must be a store", "out/x")
    assert str(error) == "`store.path` must be a store, but is 'out/x' instead."


def test_raise_all() -> None:
    raise_all([])
    with pytest.raises(ConfigError) as one:
        raise_all([TP])
    assert one.value is TP
    with pytest.raises(ConfigErrors) as both:
        raise_all([TP, PATH])
    assert both.value.problems == (TP, PATH)
    assert both.value.setting == "parallel.tp"
    assert str(both.value) == f"{TP}\n{PATH}"


@pytest.mark.parametrize("error", [TP, PATH, ConfigErrors([TP, PATH]), StoreNotFoundError("store.path", "must be", 1)])
def test_errors_cross_process_boundaries(error: UserError) -> None:
    """Ranks tell their parent what went wrong."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.setting, again.rule, again.value) == (str(error), error.setting, error.rule, error.value)
