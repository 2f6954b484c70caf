"""One job at a time, and none beside ranks of an earlier one; who ends, however, lets go."""

import errno
import fcntl
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.write import locks, place, session
from nemo_qwen_hidden.store.write.locks import job_lock, rank_lock
from nemo_qwen_hidden.store.write.writer import ShardWriter
from tests.store.helpers import begin, tree

HOLDS = """
import sys
from pathlib import Path
from nemo_qwen_hidden.store.write.locks import job_lock, rank_lock
folder = Path(sys.argv[2])
with job_lock(folder) if sys.argv[1] == "job" else rank_lock(folder, ()):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold(tmp_path: Path, start_python: Callable[..., Any]) -> Callable[[str], Any]:
    """Another process that holds a lock of ``tmp_path`` until it reads a line."""

    def hold(kind: str) -> Any:
        process = start_python(HOLDS, kind, tmp_path)
        assert process.stdout.readline() == "held\n"
        return process

    return hold


def test_a_second_job_is_refused_in_one_line_that_says_who_holds_it(tmp_path: Path, hold: Callable[[str], Any]) -> None:
    holder = hold("job")
    with pytest.raises(StoreError) as caught, job_lock(tmp_path):
        pass
    assert re.fullmatch(
        rf"`store.path` must be a store that no other run is working on; process {holder.pid} on "
        rf"{re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00, is, "
        rf"but is '{tmp_path}' instead\.",
        str(caught.value),
    )


@pytest.mark.parametrize("end", ["kill", "leave"])
def test_who_ends_lets_go(tmp_path: Path, hold: Callable[[str], Any], end: str) -> None:
    for _ in range(2):
        holder = hold("job")
        holder.kill() if end == "kill" else holder.communicate("go\n")
        holder.wait(30)
        with job_lock(tmp_path):
            pass


def test_ranks_of_one_job_write_beside_each_other(tmp_path: Path, hold: Callable[[str], Any]) -> None:
    with job_lock(tmp_path):
        hold("rank")
        hold("rank")
        with rank_lock(tmp_path, ()):
            pass


def test_a_job_waits_for_orphans(tmp_path: Path, hold: Callable[[str], Any]) -> None:
    with job_lock(tmp_path):
        orphan = hold("rank")
    threading.Timer(0.3, orphan.kill).start()
    with job_lock(tmp_path):
        assert orphan.wait(30) != 0


def test_orphans_that_do_not_end_are_named(tmp_path: Path, hold: Callable[[str], Any]) -> None:
    with job_lock(tmp_path):
        orphan = hold("rank")
    with pytest.raises(StoreError) as caught, job_lock(tmp_path, patience_secs=0.1):
        pass
    assert f"must be a store that no rank writes to; one of an earlier run does (process {orphan.pid} on" in str(
        caught.value
    )


def test_a_rank_that_comes_when_its_job_has_gone_is_refused(tmp_path: Path) -> None:
    """It slept while its starter was killed and another run took over: what it would claim, the other does not know."""
    path = tmp_path / "store"
    late = begin(path)
    with place.locked(path):
        target = replace(late, producers=(*late.producers, {"work": "resumed"}))
        session.resume(path, target, {})
        said = "must be a store that no other run begins to work on"
        with pytest.raises(StoreError, match=said):
            ShardWriter(path, late, rank=0)
        with pytest.raises(StoreError, match=said):
            session.seal_shards(path, late, [next(late.missing())], {}, rank=0)
        ShardWriter(path, target, rank=0).close()


@pytest.mark.parametrize("step", ["resume", "start"])
def test_a_rank_that_came_before_the_marker_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Between the job's look at the ranks and its marker an orphan may begin: it is waited for a second time."""
    path, order = tmp_path / "store", []
    late = begin(path)
    target = replace(late, producers=(*late.producers, {"work": "resumed"}))
    with place.locked(path):
        orphan = ShardWriter(path, late, rank=0)

        def let_go() -> None:
            order.append("orphan ended")
            orphan.close()

        threading.Timer(0.2, let_go).start()
        clear = session._clear
        monkeypatch.setattr(session, "_clear", lambda *arguments, **kept: order.append("touch") or clear(path, **kept))
        (session.resume if step == "resume" else session.start)(path, target, {})
    assert order == ["orphan ended", "touch"]


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said = r"must lie on a file system with locks.*\(No locks available\)"
    with pytest.raises(StoreError, match=said), job_lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "not json", "{}", "[]", '{"pid": 1}'])
def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path, text: str) -> None:
    with job_lock(tmp_path):
        (tmp_path / "journal/job.lock").write_text(text)
        with pytest.raises(StoreError, match="one that has not said which is"), job_lock(tmp_path):
            pass


def test_many_jobs_in_turn_never_meet(tmp_path: Path) -> None:
    """Each takes the lock's file away when it ends, while others try to get it."""
    inside, most, done, path = 0, 0, 0, tmp_path / "store"
    path.mkdir()
    (path / "manifest.json").write_text('{"format": "nemo_qwen_hidden.store"}')
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        while done < 60:
            try:
                with place.locked(path):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
                        done += 1
            except StoreError as error:
                assert "no other run is working on" in str(error) or "no rank writes to" in str(error), error

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1 and done >= 60
    assert set(tree(path)) == {"manifest.json"}


def test_locks_are_not_inherited_by_other_programs(tmp_path: Path) -> None:
    with job_lock(tmp_path), locks._open(tmp_path, "ranks.lock") as descriptor:
        assert not os.get_inheritable(descriptor)
