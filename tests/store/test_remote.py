"""Stores on other file systems: the same rows, by requests for them alone, and errors that name the file."""

import json
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.fsspec import register

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError
from nemo_qwen_hidden.store.read import remote
from nemo_qwen_hidden.store.read.datasets import BatchLoader, RowBatches
from nemo_qwen_hidden.store.read.reader import Store, open_store
from nemo_qwen_hidden.store.read.source import Folder
from tests.store.crafted import PARTS, POINTS, Crafted, craft, craft_version_2, rewrite
from tests.store.helpers import python

register("s3")
POINT = POINTS[2]
KEY, SECRET = "key", "secret"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Somewhere that stores can be put. options: of fsspec."""

    url: str
    options: dict[str, Any]

    def put(self, crafted: Crafted, name: str) -> str:
        """The URL of a copy of a store."""
        system, root = fsspec.core.url_to_fs(f"{self.url}/{name}", **self.options)
        for path in crafted.path.rglob("*.*"):
            if path.is_file():
                system.pipe_file(f"{root}/{path.relative_to(crafted.path)}", path.read_bytes())
        return f"{self.url}/{name}"

    def open(self, name: str) -> Store:
        return open_store(f"{self.url}/{name}", self.options)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of S3 in a process of its own, and obstore as fsspec's client of it."""
    folder = tmp_path_factory.mktemp("s3")
    actions = ["Admin", "Read", "Write", "List"]
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions}
    (folder / "users.json").write_text(json.dumps({"identities": [identity]}))
    ports = free_ports()
    command = [Path(sys.executable).with_name("weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += [f"-s3.config={folder}/users.json", "-volume.max=10", "-master.volumeSizeLimitMB=64"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    config = {"endpoint": f"http://127.0.0.1:{ports['s3.port']}", "access_key_id": KEY, "secret_access_key": SECRET}
    options = {"config": config | {"region": "us-east-1"}, "client_options": {"allow_http": True}}
    with open(folder / "log", "wb") as log, ExitStack() as stack:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={"HOME": str(folder)}, cwd=folder)
        stack.callback(server.wait)
        stack.callback(server.kill)
        place = Place(url="s3://bucket/some/folder", options=options)
        until(lambda: fsspec.filesystem("s3", **options).pipe_file("bucket/ready", b"yes"), server)
        yield place


def free_ports() -> dict[str, int]:
    """A port for each that the server wants, none of them in use."""
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}


def until(attempt: Callable[[], object], server: "subprocess.Popen[bytes]", seconds: float = 60) -> None:
    """Tries until it works."""
    end = time.monotonic() + seconds
    while True:
        try:
            attempt()
            return
        except Exception:
            if time.monotonic() > end or server.poll() is not None:
                raise
            time.sleep(0.2)


@pytest.fixture
def memory() -> Iterator[Place]:
    yield Place(url="memory://stores", options={})
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_same_as_on_disk(tmp_path: Path, place: Place, dtype: str) -> None:
    crafted = craft(tmp_path / "store", parts=PARTS, dtype=dtype)
    url = place.put(crafted, dtype)
    store, local = open_store(url, place.options), open_store(crafted.path)
    assert (store.path, store.manifest) == (url, local.manifest) and repr(store).startswith(f"Store('{url}': 4 hook")
    for rows in (slice(None), slice(3, 30, 4), [5, -1, 5, 0, 30], [], 7, range(20, 25)):
        ours, theirs = store.read(rows), local.read(rows)
        assert all(torch.equal(ours[name], theirs[name]) for name in local.hook_points)
    for column in ("token_id", "document", "position"):
        numbers = getattr(store.tokens, column)
        assert np.array_equal(np.asarray(numbers), getattr(crafted, column))
        assert numbers[[30, 2, 2]].tolist() == getattr(crafted, column)[[30, 2, 2]].tolist()
        assert numbers[33] == getattr(crafted, column)[33]
    assert repr(store.document(7)) == repr(local.document(7))
    assert torch.equal(store.document(7)[POINT], local.document(7)[POINT])
    ours, theirs = store[POINT].statistics(), local[POINT].statistics()
    assert np.array_equal(ours.mean, theirs.mean) and np.array_equal(ours.norms, theirs.norms)
    assert torch.equal(store[POINT].normed()[4], local[POINT].normed()[4])


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_kept_rows_and_other_shapes_are_the_same_as_on_disk(tmp_path: Path, place: Place, dtype: str) -> None:
    crafted = craft_version_2(tmp_path / "store", dtype=dtype)
    url = place.put(crafted, f"version-2-{dtype}")
    store, local = open_store(url, place.options), open_store(crafted.path)
    assert (store.manifest, repr(store["q@1"])) == (local.manifest, repr(local["q@1"]))
    for states in (slice(None), slice(3, 12, 4), [5, -1, 5, 0], [], 7, range(4, 9)):
        ours, theirs = store.read(states), local.read(states)
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert np.array_equal(store.row_of_states(states), local.row_of_states(states))
    assert store.state_of_rows([33, 1]).tolist() == [12, 0] and store.tokens.states_of(3, 24) == range(2, 9)
    for number in range(store.documents):
        ours, theirs = store.document(number), local.document(number)
        assert ours.position.tolist() == theirs.position.tolist() and torch.equal(ours["q@1"], theirs["q@1"])
    (batch,) = RowBatches(store, batch_rows=13)
    (same,) = RowBatches(local, batch_rows=13)
    assert all(torch.equal(batch[name], same[name]) for name in same)
    assert np.array_equal(store.statistics("mlp_act@1").mean, local.statistics("mlp_act@1").mean)


class Rows(RowBatches):
    """Of this module, which a worker imports, so that fsspec knows obstore there before a store is opened."""


def test_workers_read_remote_stores(tmp_path: Path, s3: Place) -> None:
    crafted = craft(tmp_path / "store", parts=PARTS)
    s3.put(crafted, "workers")
    data = Rows(s3.open("workers"), batch_rows=10, hook_points=["embed"])
    loader = BatchLoader(data, num_workers=1, multiprocessing_context="spawn")
    found = {row: values for batch in loader for row, values in zip(batch["row"].tolist(), batch["embed"], strict=True)}
    assert torch.equal(torch.stack([found[row] for row in range(34)]), crafted.states[POINTS[0]])
    with pytest.raises(RuntimeError, match=r"StoreError: .* by workers that are spawned, not forked"):
        list(BatchLoader(data, num_workers=1, multiprocessing_context="fork"))


class Counting(MemoryFileSystem):  # type: ignore[misc]
    """A file system that tells of each byte it gives."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    given: ClassVar[list[tuple[str, int, int]]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **options)
        self.given.append((path, start or 0, len(data)))
        return data


@pytest.fixture
def counting() -> Iterator[Place]:
    fsspec.register_implementation("counting", Counting, clobber=True)
    yield Place(url="counting://stores", options={})
    Counting.store.clear()


def test_only_the_rows_asked_for_are_got(tmp_path: Path, counting: Place) -> None:
    crafted = craft(tmp_path / "store", parts=(((3000,), 1000),), hidden_size=512, points=POINTS[:2])
    counting.put(crafted, "a")
    Counting.given.clear()
    store = counting.open("a")
    assert [Path(path).name for path, _, _ in Counting.given] == ["manifest.json"]
    store["embed"][[10, 2999]]
    Counting.given.clear()
    rows = [2500, 10, 12, 500, 11]  # of 2,048 bytes; three of them within 16 kB of each other
    assert torch.equal(store["embed"][rows], crafted.states[POINTS[0]][rows])
    assert sorted(size for _, _, size in Counting.given) == [2048, 2048, 3 * 2048]
    Counting.given.clear()
    store.read([7, 8])
    assert sum(size for _, start, size in Counting.given if start > 100) == 2 * 2 * 2048
    Counting.given.clear()
    assert store["embed"][[]].shape == (0, 512) and store.read([7], []) == {} and not Counting.given


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_spans_are_cut_and_joined(data: st.DataObject) -> None:
    """Any rows of any files, with limits of a few bytes."""
    length = data.draw(st.integers(1, 5))
    files = [bytes(np.random.default_rng(seed).integers(0, 256, 60, np.uint8)) for seed in range(3)]
    places = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60 - length)), max_size=30))
    requests: list[remote.Span] = []

    class FakeFolder:
        def get(self, spans: list[remote.Span]) -> list[bytes]:
            requests.extend(spans)
            return [files[int(span.file)][span.start : span.stop] for span in spans]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GAP_BYTES", "REQUEST_BYTES", "AT_ONCE_BYTES"):
            patch.setattr(remote, name, data.draw(st.integers(0 if name == "GAP_BYTES" else 1, 30)))
        of_file, starts = (np.array([place[axis] for place in places], np.int64) for axis in (0, 1))
        found = remote.fetch(FakeFolder(), ["0", "1", "2"], of_file, starts, length)  # type: ignore[arg-type]
        assert [bytes(row) for row in found] == [files[file][start : start + length] for file, start in places]
        assert all(span.stop - span.start <= remote.REQUEST_BYTES + length for span in requests)


def test_there_is_no_store(place: Place) -> None:
    with pytest.raises(StoreNotFoundError, match=rf"with a manifest.json, but is '{place.url}/nothing' instead"):
        place.open("nothing")


def test_an_unfinished_store_says_so(memory: Place) -> None:
    fsspec.filesystem("memory").pipe_file("/stores/begun/unfinished.json", b'{"pid": 3, "host": "h", "started": "now"}')
    with pytest.raises(StoreNotFoundError, match=r"must be a finished store; .* \(begun now by process 3 on h\)"):
        memory.open("begun")


def spoil_missing(folder: Path) -> None:
    (folder / "embed/000001.safetensors").unlink()


def spoil_short(folder: Path) -> None:
    path = folder / "embed/000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_long(folder: Path) -> None:
    path = folder / "embed/000001.safetensors"
    path.write_bytes(path.read_bytes() + b"x")


def spoil_swap(folder: Path) -> None:
    (folder / "embed/000001.safetensors").write_bytes((folder / "embed/000002.safetensors").read_bytes())


def spoil_pickle(folder: Path) -> None:
    (folder / "embed/000001.safetensors").write_bytes(pickle.dumps(list(range(1000))))


def spoil_empty(folder: Path) -> None:
    (folder / "embed/000001.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_missing, "must be a file that can be read, but is 'FileNotFoundError: "),
        (spoil_short, "must be [0-9]+ bytes long, as its header says"),
        (spoil_long, "must be [0-9]+ bytes long, as its header says"),
        (spoil_swap, "must have first_row 5, as the manifest says, but is '10'"),
        (spoil_pickle, "must start with the length of a safetensors header"),
        (spoil_empty, "must start with the length of a safetensors header"),
    ],
)
def test_a_shard_that_is_not_what_the_manifest_says(
    tmp_path: Path, place: Place, spoil: Callable[[Path], None], said: str
) -> None:
    crafted = craft(tmp_path / "store")
    spoil(crafted.path)
    name = spoil.__name__
    place.put(crafted, name)
    store = place.open(name)
    assert torch.equal(store["embed"][:5], crafted.states[POINTS[0]][:5])
    with pytest.raises(StoreError, match=said) as caught:
        store["embed"][[0, 6]]
    assert caught.value.setting == f"{place.url}/{name}/embed/000001.safetensors"
    with pytest.raises(StoreError, match=said):
        store["embed"].statistics()


def test_a_header_longer_than_is_read_at_first(tmp_path: Path, memory: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_HEAD_BYTES", 100)
    crafted = craft(tmp_path / "store")
    memory.put(crafted, "a")
    assert torch.equal(memory.open("a")[POINT][:], crafted.states[POINT])


def test_a_server_that_goes_away_is_named(tmp_path: Path, memory: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.put(craft(tmp_path / "store"), "a")
    store = memory.open("a")

    def gone(*_: object, **__: object) -> bytes:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", gone)
    with pytest.raises(StoreError, match="must be a file that can be read, but is 'ConnectionError: the line is dead'"):
        store["embed"][0]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "embed/../../secret", "memory://secret"])
def test_nothing_outside_is_asked_for(tmp_path: Path, memory: Place, name: str) -> None:
    crafted = craft(tmp_path / "store")
    rewrite(crafted.path, lambda fields: fields["hook_points"][0]["shards"][0].update(file=name))
    memory.put(crafted, "a")
    with pytest.raises(StoreError, match="must be a plain path inside the store's folder"):
        memory.open("a")


def test_a_url_of_this_machine_is_a_folder(tmp_path: Path) -> None:
    crafted = craft(tmp_path / "store")
    for url in (f"file://{crafted.path}", f"local://{crafted.path}"):
        store = open_store(url)
        assert store.path == crafted.path and isinstance(store._source, Folder)
        assert torch.equal(store[POINT][:], crafted.states[POINT])


def test_what_fsspec_does_not_know() -> None:
    with pytest.raises(StoreError, match=r"must be a URL that fsspec can open \(Protocol not known: nosuch\)"):
        open_store("nosuch://store")
    with pytest.raises(StoreError, match=r"`storage_options` must be given with a URL alone, but is \['key'\]"):
        open_store("/some/folder", {"key": "x"})


def test_fsspec_is_imported_for_a_url_alone(tmp_path: Path) -> None:
    path = craft(tmp_path / "store").path
    code = "import sys; from nemo_qwen_hidden import open_store; {}; print('fsspec' in sys.modules)"
    assert python(code.format("open_store(sys.argv[1]).read([0])"), path)[-1] == "False"
    assert python(code.format("open_store('file://' + sys.argv[1]).read([0])"), path)[-1] == "True"
