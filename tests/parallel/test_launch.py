"""Ranks from a fork server that has imported nothing: how they start, speak, fail and end."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nemo_qwen_hidden.errors import ConfigError, RankError
from nemo_qwen_hidden.parallel import launch
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks
from tests.parallel.helpers import Listener

LONG_SECS = 60


def report(rank: Rank, factor: int) -> tuple[int, int]:
    print(f"rank {rank.rank} speaks")
    assert rank.rendezvous.is_absolute() and not rank.rendezvous.exists()
    for number in range(3):
        rank.send(number)
    return rank.rank * factor, rank.world


def test_results_come_by_rank_and_events_as_they_are_sent(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    listener = Listener()
    assert run_ranks(report, (10,), world=3, log=log, on_event=listener) == [(0, 3), (10, 3), (20, 3)]
    assert sorted(listener.events) == [(rank, number) for rank in range(3) for number in range(3)]
    assert capfd.readouterr() == ("", "")
    assert sorted(line for line in log.read_text().splitlines() if "speaks" in line) == [
        f"rank {rank} speaks" for rank in range(3)
    ]


def fail(rank: Rank, how: str) -> None:
    """Rank 1 fails; the others would go on for long."""
    rank.send(os.getpid())
    if rank.rank != 1:
        time.sleep(LONG_SECS)
    if how == "user":
        raise ConfigError("parallel.tp", "must be nice", 3)
    if how == "fault":
        raise RuntimeError("the first line\nthe second")
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, how))


def test_a_users_error_arrives_as_it_was_and_ends_all(log: Path) -> None:
    listener = Listener()
    with pytest.raises(ConfigError, match="must be nice, but is 3") as caught:
        run_ranks(fail, ("user",), world=3, log=log, on_event=listener)
    assert (caught.value.setting, caught.value.value) == ("parallel.tp", 3)
    assert listener.none_is_alive()


FAILURES = {
    "fault": "rank 1 failed: RuntimeError: the first line",
    "exit": "rank 1 ended without a word (exit code 7)",
    "SIGKILL": "rank 1 was ended by SIGKILL, as when the machine runs out of memory",
    "SIGTERM": "rank 1 was ended by SIGTERM",
}


@pytest.mark.parametrize(("how", "said"), FAILURES.items(), ids=FAILURES)
def test_a_rank_that_fails_ends_all(log: Path, how: str, said: str) -> None:
    listener = Listener()
    with pytest.raises(RankError) as caught:
        run_ranks(fail, (how,), world=3, log=log, on_event=listener)
    assert str(caught.value).splitlines()[0] == said
    assert ("RuntimeError: the first line" in log.read_text()) == (how == "fault")
    assert listener.none_is_alive()


def fail_one_after_the_other(rank: Rank) -> None:
    """As where a user's error takes one rank away and its peers notice first."""
    if rank.rank == 0:
        raise RuntimeError("connection closed by peer")
    time.sleep(0.2)
    raise ConfigError("store.path", "must have room", "x")


def test_what_the_user_did_explains_more_than_a_lost_connection(log: Path) -> None:
    with pytest.raises(ConfigError, match="must have room"):
        run_ranks(fail_one_after_the_other, world=2, log=log)


def wait_stubbornly(rank: Rank, deaf_to: str) -> None:
    signal.signal(getattr(signal, deaf_to), signal.SIG_IGN)
    rank.send(os.getpid())
    time.sleep(LONG_SECS)


def test_an_interrupt_ends_all(log: Path) -> None:
    listener = Listener(then=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_ranks(wait_stubbornly, ("SIGUSR1",), world=2, log=log, on_event=listener)
    assert listener.none_is_alive()


def test_a_second_interrupt_does_not_save_a_stubborn_rank(log: Path) -> None:
    again = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))

    def interrupt() -> None:
        again.start()
        signal.raise_signal(signal.SIGINT)

    listener = Listener(then=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_ranks(wait_stubbornly, ("SIGTERM",), world=1, log=log, on_event=listener)
    again.join()
    assert listener.none_is_alive()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def survive_an_interrupt(rank: Rank) -> str:
    signal.raise_signal(signal.SIGINT)
    return "alive"


def test_the_starter_alone_heeds_an_interrupt(log: Path) -> None:
    assert run_ranks(survive_an_interrupt, world=1, log=log) == ["alive"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_and_no_second(number: signal.Signals) -> None:
    with launch.one_interrupt():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_output_goes_to_the_log_and_comes_back(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    print("before", flush=True)
    with launch.output_to(log):
        os.system("echo from a process")
        os.write(1, b"from here\n")
    print("after", flush=True)
    assert capfd.readouterr().out == "before\nafter\n"
    assert log.read_text() == "from a process\nfrom here\n"


LAUNCHERS = {
    "none": ({}, None, True, True),
    "torchrun-first": ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 4, True, True),
    "torchrun-second-machine": ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 4, False, True),
    "torchrun-last": ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 4, False, False),
    "without-local-rank": ({"RANK": "3", "WORLD_SIZE": "4"}, 4, False, False),
}


@pytest.mark.parametrize(("environment", "world", "first", "first_here"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_what_a_launcher_has_said(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], world: int | None, first: bool, first_here: bool
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.launched_world() == world
    assert (launch.is_first_rank(), launch.is_first_of_machine()) == (first, first_here)


NONSENSE = {
    "world": (
        {"RANK": "0", "WORLD_SIZE": "two"},
        "variable WORLD_SIZE` must be a whole number .* but is 'two' instead",
    ),
    "rank": ({"RANK": "-1", "WORLD_SIZE": "2"}, "variable RANK` must be a whole number"),
    "beyond": ({"RANK": "2", "WORLD_SIZE": "2"}, r"variable RANK` must be below WORLD_SIZE \(2\), but is 2 instead"),
    "local": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "variable LOCAL_RANK` must be a whole number"),
}


@pytest.mark.parametrize(("environment", "said"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_from_a_launcher(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        launch.launched_world()


def test_nothing_is_preloaded_where_a_gpu_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process cannot use CUDA that the server has initialised."""
    monkeypatch.setattr(launch, "PRELOAD", ("nemo",))
    monkeypatch.setattr(launch, "DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert launch._preload() == ["nemo"]
    (tmp_path / "nvidia0").touch()
    assert launch._preload() == []
