"""Stores made by someone who means harm: refused quickly, with nothing outside of the folder opened and no code run."""

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_qwen_hidden import open_store
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.header import read_header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.upkeep.verify import verify
from tests.store.crafted import craft, rewrite

SHARD = "embed/000000.safetensors"
Fields = dict[str, Any]


class _Watch:
    """Paths that this process opens while ``root`` is set. An audit hook cannot be taken away again."""

    root: Path | None = None
    strange: tuple[str, ...] = ()
    hooked = False

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.root is None or event not in ("open", "os.scandir", "os.listdir"):
            return
        path = arguments[0]
        if isinstance(path, int) or path is None:
            return
        name = os.fsdecode(path)
        if os.path.isabs(name):
            inside = not os.path.realpath(name).startswith(str(cls.root.parent / "outside"))
        else:  # below a folder that is open: a plain name, and no link followed
            inside = "/" not in name and name != ".." and bool(arguments[2] & os.O_NOFOLLOW)
        if not inside or name.startswith("/etc"):
            cls.strange += (f"{event} {name}",)


@contextmanager
def nothing_outside(store: Path) -> Iterator[None]:
    """Asserts that nothing outside of ``store`` is opened, and that it takes no time."""
    if not _Watch.hooked:
        sys.addaudithook(_Watch.hook)
        _Watch.hooked = True
    _Watch.root, _Watch.strange = store, ()
    start = time.process_time()
    try:
        yield
    finally:
        _Watch.root = None
    assert _Watch.strange == ()
    assert time.process_time() - start < 2


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    made = craft(tmp_path / "store")
    for file in made.path.rglob("*.*"):
        if file.is_file():
            copy = tmp_path / "outside" / file.relative_to(made.path)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return made.path


def read_all(path: Path) -> None:
    opened = open_store(path)
    for point in opened.hook_points:
        opened[point][:]
        opened.statistics(point)
    np.asarray(opened.tokens.token_id), opened.document(0), opened.final_norm


def is_refused(path: Path, *, to_read: bool = True) -> None:
    """By verification as findings or an error; by a reader, where it touches what is wrong, as an error."""
    with nothing_outside(path):
        try:
            assert verify(path, full=True).findings
        except StoreError:
            assert main(["inspect", str(path)]) == 2
        if to_read:
            with pytest.raises(StoreError):
                read_all(path)


def first_shard(**changes: Any) -> Callable[[Fields], object]:
    return lambda fields: fields["hook_points"][0]["shards"][0].update(changes)


NAMES: dict[str, Callable[[Fields], object]] = {
    "up": first_shard(file="../outside/embed/000000.safetensors"),
    "up-inside": first_shard(file="embed/../../outside/embed/000000.safetensors"),
    "absolute": first_shard(file="/etc/passwd"),
    "empty": first_shard(file=""),
    "dot": first_shard(file="."),
    "folder": first_shard(file="embed"),
    "nul": first_shard(file="embed/0\0"),
    "backslash": first_shard(file="embed\\..\\..\\outside"),
    "surrogate": first_shard(file="embed/\ud800.safetensors"),
    "long": first_shard(file="embed/" + "0" * 5000),
    "manifest": first_shard(file="manifest.json"),
    "tokens-up": lambda fields: fields["parts"][0]["tokens"].update(file="../outside/tokens/000000.safetensors"),
    "lines-up": lambda fields: fields["parts"][0]["documents_file"].update(file="../outside/tokens/0.jsonl"),
    "norm-absolute": lambda fields: fields["final_norm"].update(file="/etc/passwd"),
    "hook-point-up": lambda fields: fields["hook_points"][0].update(name="../outside", site="../outside"),
    "hook-point-empty": lambda fields: fields["hook_points"][0].update(name="", site=""),
}


@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES)
def test_names_that_lead_outside(store: Path, change: Callable[[Fields], object]) -> None:
    rewrite(store, change)
    is_refused(store)


def _remove(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            child.unlink()
        path.rmdir()
    else:
        path.unlink()


LINKED = [SHARD, "embed", "tokens", "tokens/000000.safetensors", "tokens/000000.documents.jsonl"]
LINKED += ["final_norm.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", LINKED)
def test_links_that_lead_outside(store: Path, name: str) -> None:
    """Though what lies there is right."""
    _remove(store / name)
    (store / name).symlink_to(store.parent / "outside" / name)
    is_refused(store)


@pytest.mark.parametrize("name", ["journal", "unfinished.json", "resid_post@1"])
def test_other_links_are_found_and_never_followed(store: Path, name: str) -> None:
    (store / name).symlink_to(store.parent / "outside")
    is_refused(store, to_read=False)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/nemo_qwen_hidden-payload",)


@pytest.mark.parametrize("name", [SHARD, "tokens/000000.safetensors", "final_norm.safetensors", "manifest.json"])
def test_pickles_are_not_run(store: Path, name: str) -> None:
    size = (store / name).stat().st_size
    (store / name).write_bytes(pickle.dumps(Payload()).ljust(size, b"\0"))
    is_refused(store)
    assert not os.path.exists("/tmp/nemo_qwen_hidden-payload")


HUGE = 2**62
SIZES: dict[str, Callable[[Fields], object]] = {
    "rows": lambda fields: (fields.update(rows=HUGE), fields["parts"][0].update(rows=HUGE)),
    "rows-in-one-shard": lambda fields: (
        fields.update(rows=HUGE),
        fields["parts"][0].update(rows=HUGE, shard_rows=HUGE),
        [point.update(shards=[{**point["shards"][0], "rows": HUGE}]) for point in fields["hook_points"]],
    ),
    "documents": lambda fields: (fields.update(documents=HUGE), fields["parts"][0].update(documents=HUGE)),
    "hidden-size": lambda fields: fields.update(hidden_size=HUGE),
    "bytes": first_shard(bytes=HUGE),
    "rows-of-a-shard": first_shard(rows=HUGE),
    "shard-rows": lambda fields: fields["parts"][0].update(shard_rows=1),
    "statistics": lambda fields: fields["hook_points"][0]["shards"][0]["statistics"].update(rows=HUGE),
    "table-bytes": lambda fields: fields["parts"][0]["tokens"].update(bytes=HUGE),
}


@pytest.mark.parametrize("change", SIZES.values(), ids=SIZES)
def test_absurd_sizes(store: Path, change: Callable[[Fields], object]) -> None:
    rewrite(store, change)
    is_refused(store, to_read=change is not SIZES["statistics"])


def test_an_absurd_size_that_no_file_contradicts(tmp_path: Path) -> None:
    path = craft(tmp_path / "store", parts=(), final_norm=False).path
    rewrite(path, lambda fields: fields.update(hidden_size=HUGE))
    is_refused(path)


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> bytes:
    return json.dumps({"embed": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HEADERS = {
    "length": header(b"{}", HUGE),
    "length-0": header(b"", 0),
    "length-beyond": header(b"{}", 10_000),
    "shape": header(entry([HUGE, HUGE], [0, 0])),
    "long-shape": header(entry([HUGE] * 40_000, [0, 8])),
    "many-zeros": header(entry([0] * 200_000, [0, 0])),
    "offsets": header(entry([1], [HUGE, HUGE + 4])),
    "negative": header(entry([1], [-4, 0])),
    "float": header(entry([1.0], [0, 4])),  # type: ignore[list-item]
    "nested": header(b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "unclosed": header(b"[" * 1_000_000),
    "digits": header(b'{"embed": {"dtype": "F32", "shape": [' + b"9" * 100_000 + b'], "data_offsets": [0, 4]}}'),
    "metadata": header(b'{"__metadata__": {"a": ["' + b"x" * 500_000 + b'"]}}'),
    "not-utf-8": header(b'{"\xff": 1}'),
    "twice": header(b'{"__metadata__": {}, "__metadata__": {}}'),
    "empty-file": b"",
}


@pytest.mark.parametrize("contents", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("name", [SHARD, "tokens/000000.safetensors", "final_norm.safetensors"])
def test_headers(store: Path, name: str, contents: bytes) -> None:
    """In files of the size that the manifest lists, so that nobody stops at that."""
    (store / name).write_bytes(contents + bytes(64))
    size = (store / name).stat().st_size

    def resize(fields: Fields) -> None:
        entries = (fields["hook_points"][0]["shards"][0], fields["parts"][0]["tokens"], fields["final_norm"])
        for listed in entries:
            if listed["file"] == name:
                listed["bytes"] = size

    rewrite(store, resize)
    is_refused(store)


BOMBS = {
    "nested": b"[" * 10_000_000,
    "nested-objects": b'{"a":' * 1_000_000,
    "digits": b'{"rows": ' + b"9" * 10_000_000 + b"}",
    "exponent": b'{"format": "nemo_qwen_hidden.store", "version": 1e400}',
    "twice": b'{"format": "nemo_qwen_hidden.store", "format": "nemo_qwen_hidden.store"}',
    "string": b'{"format": "' + b"x" * 50_000_000 + b'"}',
    "not-a-number": b'{"format": NaN}',
    "empty": b"",
    "a-list": b"[]",
    "not-utf-8": b'{"format": "\xff"}',
}


@pytest.mark.parametrize("contents", BOMBS.values(), ids=BOMBS)
def test_manifests(store: Path, contents: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "manifest.json").write_bytes(contents)
    is_refused(store)
    assert len(capsys.readouterr().err) < 1000


@pytest.mark.parametrize("contents", BOMBS.values(), ids=BOMBS)
def test_lines_about_documents(store: Path, contents: bytes) -> None:
    """A reader reads the line that is asked for, a verification all."""
    lines = store / "tokens/000000.documents.jsonl"
    text = contents + b"\n" + b"\n".join(lines.read_bytes().split(b"\n")[1:])
    lines.write_bytes(text)
    rewrite(store, lambda fields: fields["parts"][0]["documents_file"].update(bytes=len(text)))
    is_refused(store)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (craft(tmp_path_factory.mktemp("fuzz") / "store").path / "manifest.json").read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=JSON)
def test_a_manifest_with_any_value_anywhere(manifest: bytes, data: st.DataObject, value: Any) -> None:
    """With a right digest, so that the fields themselves are looked at."""
    import hashlib

    fields = json.loads(manifest)
    holder, key = fields, data.draw(st.sampled_from(sorted(fields)))
    while isinstance(holder[key], (dict, list)) and holder[key] and data.draw(st.booleans()):
        holder = holder[key]
        keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
        key = data.draw(st.sampled_from(keys))
    holder[key] = value
    blank = json.dumps({**fields, "sha256": "0" * 64}).encode()
    text = blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)
    try:
        parsed = Manifest.from_json(text)
    except StoreError:
        return
    assert Manifest.from_json(parsed.to_json()) == parsed


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=200))
def test_a_manifest_of_any_bytes(text: bytes) -> None:
    with pytest.raises(StoreError):
        Manifest.from_json(text)


@settings(max_examples=300, deadline=None)
@given(value=JSON, length=st.none() | st.integers(0, 2**64 - 1), tail=st.binary(max_size=20), key=st.integers(0, 3))
def test_a_header_with_any_value_anywhere(value: Any, length: int | None, tail: bytes, key: int) -> None:
    fields: Any = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    entries: Any = {"embed": fields, "__metadata__": {"norm": "before"}}
    if key < 3:
        fields[list(fields)[key]] = value
    else:
        entries[list(entries)[len(tail) % 2]] = value
    descriptor = os.memfd_create("header")
    try:
        os.write(descriptor, header(json.dumps(entries).encode(), length) + tail)
        found = read_header(descriptor, "file")
    except StoreError:
        return
    finally:
        os.close(descriptor)
    assert found.size_bytes >= 8
