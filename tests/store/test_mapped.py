"""Rows of many shards through one region of addresses: the right ones, whatever is in memory and whoever asks."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.read import ahead, mapped, maps, slots
from nemo_qwen_hidden.store.read.reader import Store, open_store
from tests.store.crafted import PARTS, POINTS, Crafted, craft

POINT = POINTS[2]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Crafted:
    """A store that no test changes: 4 hook points of 10 shards."""
    return craft(tmp_path_factory.mktemp("fixed") / "store", parts=PARTS, dtype="int8")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_rows_of_any_parts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lengths = st.lists(st.integers(0, 9), max_size=3)
    parts = data.draw(st.lists(st.tuples(lengths, st.integers(1, 12)), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(["fp32", "bf16", "fp16", "int8"]))
    hidden_size = data.draw(st.integers(1, 5))
    path = tmp_path_factory.mktemp("t") / "store"
    crafted = craft(path, parts=parts, dtype=dtype, hidden_size=hidden_size, points=POINTS[:2])
    count = crafted.rows
    rows: Any = slice(*data.draw(st.tuples(*[st.none() | st.integers(-20, 20)] * 2)))
    truth = {str(point): values[rows] for point, values in crafted.states.items()}
    if count and data.draw(st.booleans()):
        rows = data.draw(st.lists(st.integers(-count, count - 1), max_size=40))
        truth = {str(point): values[torch.tensor(rows, dtype=torch.long)] for point, values in crafted.states.items()}
    found = open_store(path).read(rows)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def check(store: Store, fixed: Crafted, seed: int) -> None:
    """Random reads of every kind."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        rows = rng.integers(0, fixed.rows, 50)
        start, stop = sorted(rng.integers(0, fixed.rows, 2).tolist())
        for chosen in (rows, range(start, stop)):
            for point in rng.permutation(len(POINTS)).tolist():
                truth = fixed.states[POINTS[point]][torch.tensor(chosen, dtype=torch.long)]
                assert torch.equal(store[POINTS[point]][chosen], truth)


@pytest.mark.parametrize("most", [1, 2, 7, 39])
def test_fewer_maps_than_shards(fixed: Crafted, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(slots, "MOST_MAPS", most)
    store = open_store(fixed.path)
    check(store, fixed, seed=most)
    held = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(fixed.path) in line}
    assert len(held) <= most


def test_fewer_maps_than_threads_want(fixed: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MOST_MAPS", 3)
    store = open_store(fixed.path)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, store, fixed, seed) for seed in range(4)]:
            done.result()


def test_threads_open_each_shard_once(fixed: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(slots, "open_inside", lambda *name: (opened.append(name), maps.open_inside(*name))[1])
    store = open_store(fixed.path)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, store, fixed, seed) for seed in range(4)]:
            done.result()
    assert len(opened) == len(set(opened)) == 40


def test_few_addresses(fixed: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    real = slots.Region

    def region(size: int, alignment: int) -> maps.Region:
        if size > 200_000:
            raise OSError(12, "Cannot allocate memory")
        return real(size, alignment)

    monkeypatch.setattr(slots, "Region", region)
    check(open_store(fixed.path), fixed, seed=0)


def test_no_addresses_at_all(fixed: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    def region(size: int, alignment: int) -> maps.Region:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(slots, "Region", region)
    with pytest.raises(StoreError, match=r"shards that can be mapped into memory, of up to .* but is 'Cannot"):
        open_store(fixed.path)[POINT][0]


def test_too_many_maps(fixed: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(fixed.path)
    assert torch.equal(store[POINT][0], fixed.states[POINT][0])

    def no_map(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(maps.Region, "map", no_map)
        with pytest.raises(StoreError, match=r"000001.safetensors` must be mapped into memory, but is 'Cannot"):
            store[POINT][5]
    check(store, fixed, seed=1)


def forget(path: Path) -> None:
    for file in path.rglob("*.safetensors"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("memory", [10**15, 1])
def test_rows_that_are_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(ahead, "memory_bytes", lambda: memory)
    advised: list[int] = []
    advise = maps.Region.advise
    monkeypatch.setattr(
        maps.Region, "advise", lambda region, *what: (advised.append(what[2]), advise(region, *what))[1]
    )
    crafted = craft(tmp_path / "store", parts=(((2000,), 900),), hidden_size=640, points=POINTS[2:3])
    os.sync()
    forget(crafted.path)
    rows = np.random.default_rng(0).integers(0, 2000, 300)
    store = open_store(crafted.path)
    assert torch.equal(store[POINT][rows], crafted.states[POINT][rows])
    assert torch.equal(store[POINT][100:1100], crafted.states[POINT][100:1100])
    assert (1 in advised) == (memory == 1) and 3 in advised  # MADV_RANDOM, MADV_WILLNEED


def test_large_reads_use_threads(fixed: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "THREADED_BYTES", 10)
    check(open_store(fixed.path), fixed, seed=2)


def read_in_child(store: Store, connection: Any) -> None:
    connection.send(store[POINT][[0, 30]].tolist())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_it_lacks(fixed: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MOST_MAPS", 3)
    store = open_store(fixed.path)
    assert torch.equal(store[POINT][0], fixed.states[POINT][0])
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store._shards._opened.holding():  # type: ignore[attr-defined]
            locked.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(60)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=read_in_child, args=(store, theirs))
    child.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == fixed.states[POINT][[0, 30]].tolist()
    finally:
        done.set()
        thread.join()
        child.kill()
        child.join()


def test_descriptors_and_maps_go_again(fixed: Crafted) -> None:
    store = open_store(fixed.path)
    store.read(slice(None))
    part = store.tokens.part(0).token_id[2:5]
    assert not any(str(fixed.path) in os.readlink(link) for link in links())
    assert str(fixed.path) in Path("/proc/self/maps").read_text()
    del store
    left = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(fixed.path) in line}
    assert left == {str(fixed.path / "tokens/000000.safetensors")} and part.tolist() == fixed.token_id[2:5].tolist()


def links() -> list[Path]:
    return [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def test_a_region_takes_whole_pages_within_it() -> None:
    region = maps.Region(8192)
    for offset, size in ((1, 10), (4096, 4097), (-4096, 10)):
        with pytest.raises(ValueError, match="are not pages of a region of 8192"):
            region.map(offset, 0, size)
