"""The same store, row for row, from every layout, batch size, and with packing on and off."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_qwen_hidden import extract
from nemo_qwen_hidden.config import (
    CaptureSettings,
    DataSettings,
    ModelSettings,
    ParallelSettings,
    PrecisionSettings,
    RuntimeSettings,
    Settings,
    StoreSettings,
)
from nemo_qwen_hidden.job import prepare
from nemo_qwen_hidden.store.read.reader import Store, open_store
from tests.conftest import Start
from tests.support.models import TINY, VOCAB, Tiny
from tests.support.ranks import stored

DOCUMENTS = (3, 0, 31, 1, 57, 17, 23, 2, 90, 40)
HOOK_POINTS = ("embed", "resid_post@0", "resid_post@-1", "final_norm")

SAME_BITS = [{"pp": 2}, {"pp": 3}, {"dp": 2}, {"dp": 3}, {"pp": 2, "dp": 2}]
SAME_ROWS = [{"tp": 2}, {"tp": 2, "sp": True}, {"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "sp": True}, {"tp": 2, "dp": 2}]
OTHER_BATCHES: list[dict[str, Any]] = [{"batch_tokens": 8}, {"packing": False}, {"packing": False, "batch_tokens": 300}]


@pytest.fixture(scope="module")
def settings(tiny_folders: dict[Tiny, Path], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("stores")
    generator = torch.Generator().manual_seed(3)
    with open(folder / "documents.jsonl", "w") as file:
        for length in DOCUMENTS:
            ids = torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist()
            file.write(json.dumps({"token_ids": ids}) + "\n")
    return Settings(
        model=ModelSettings(path=str(tiny_folders[TINY[1]])),
        capture=CaptureSettings(hook_points=HOOK_POINTS),
        data=DataSettings(path=str(folder / "documents.jsonl"), max_tokens=50, batch_tokens=100),
        store=StoreSettings(path=str(folder / "one"), shard_rows=33),
        runtime=RuntimeSettings(threads=1),
    )


def make_store(settings: Settings, start_ranks: Any) -> Store:
    job = prepare(settings, world=None, for_store=True)
    with extract.locked(job):
        begun = extract.begin(job)
        extract.finish(job, begun, start_ranks(job.topology.world, stored, job, begun))
    return open_store(job.store_path)


@pytest.fixture(scope="module")
def one_rank(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Store:
    from nemo_qwen_hidden.parallel.launch import run_ranks

    log = tmp_path_factory.mktemp("log") / "ranks.log"
    return make_store(settings, lambda world, target, *args: run_ranks(target, args, world=world, log=log))


def elsewhere(settings: Settings, path: Path) -> Settings:
    return replace(settings, store=replace(settings.store, path=str(path)))


def shard_bytes(store: Store) -> dict[str, bytes]:
    files = sorted(store.path.rglob("*.safetensors"))
    return {str(file.relative_to(store.path)): file.read_bytes() for file in files}


def largest_difference(store: Store, other: Store) -> float:
    """Relative norm over all rows, of the hook point where it is largest."""
    rows = slice(None)
    return max(
        float((store[point][rows].double() - other[point][rows].double()).norm() / other[point][rows].double().norm())
        for point in store.hook_points
    )


@pytest.mark.parametrize("layout", SAME_BITS, ids=str)
def test_stages_and_replicas_change_no_bit(
    layout: dict[str, Any], settings: Settings, one_rank: Store, tmp_path: Path, start_ranks: Start
) -> None:
    asked = replace(elsewhere(settings, tmp_path / "store"), parallel=ParallelSettings(**layout))
    assert shard_bytes(make_store(asked, start_ranks)) == shard_bytes(one_rank)


@pytest.mark.parametrize("layout", SAME_ROWS, ids=str)
def test_tensor_parallel_gives_the_same_rows(
    layout: dict[str, Any], settings: Settings, one_rank: Store, tmp_path: Path, start_ranks: Start
) -> None:
    asked = replace(elsewhere(settings, tmp_path / "store"), parallel=ParallelSettings(**layout))
    store = make_store(asked, start_ranks)
    assert largest_difference(store, one_rank) <= 5e-6
    assert (store.path / "tokens/000000.safetensors").read_bytes() == (
        one_rank.path / "tokens/000000.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("batching", OTHER_BATCHES, ids=str)
def test_batches_and_packing_give_the_same_rows(
    batching: dict[str, Any], settings: Settings, one_rank: Store, tmp_path: Path, start_ranks: Start
) -> None:
    asked = elsewhere(settings, tmp_path / "store")
    asked = replace(asked, data=replace(asked.data, **batching))
    assert largest_difference(make_store(asked, start_ranks), one_rank) <= 5e-6


@pytest.mark.parametrize("layout", [{"pp": 2, "dp": 2}, {"tp": 2, "sp": True}], ids=str)
def test_gathering_on_rank_0_writes_the_same_store(
    layout: dict[str, Any], settings: Settings, one_rank: Store, tmp_path: Path, start_ranks: Start
) -> None:
    asked = replace(elsewhere(settings, tmp_path / "store"), parallel=ParallelSettings(**layout))
    asked = replace(asked, capture=replace(asked.capture, gather="rank0"))
    store = make_store(asked, start_ranks)
    assert largest_difference(store, one_rank) <= (0 if "tp" not in layout else 5e-6)


def test_rows_and_windows(one_rank: Store) -> None:
    """Rows follow documents and tokens; a document longer than the window stays one document."""
    assert one_rank.rows == sum(DOCUMENTS)
    assert one_rank.tokens.document.tolist() == [d for d, length in enumerate(DOCUMENTS) for _ in range(length)]
    assert one_rank.tokens.position.tolist() == [position for length in DOCUMENTS for position in range(length)]
    assert one_rank.manifest.parts[0].data["max_tokens"] == 50
    assert one_rank.manifest.parts[0].data["documents_cut_into_windows"] == 2


def test_stored_dtype_is_chosen_apart(settings: Settings, one_rank: Store, tmp_path: Path, start_ranks: Start) -> None:
    asked = replace(elsewhere(settings, tmp_path / "store"), precision=PrecisionSettings(compute="fp32", stored="bf16"))
    store = make_store(asked, start_ranks)
    for point in store.hook_points:
        assert torch.equal(store[point][:], one_rank[point][:].to(torch.bfloat16))
