"""What other tools read from an export is what the store gives."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError
from nemo_qwen_hidden.store.read.reader import Store, UnknownHookPointError
from nemo_qwen_hidden.store.upkeep import export as export_module
from nemo_qwen_hidden.store.upkeep.export import export
from tests.store.crafted import KEPT, PARTS, POINTS, SHAPES, Crafted, craft, craft_version_2

NUMPY = {"fp32": np.float32, "bf16": np.float32, "fp16": np.float16, "int8": np.float32}
TOKENS = ("token_id", "document", "position")


@pytest.fixture(scope="module", params=list(NUMPY))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Crafted:
    return craft(tmp_path_factory.mktemp("made") / "store", parts=PARTS, dtype=request.param)


def expected(store: Crafted, point: Any, dtype: Any) -> np.ndarray:
    return store.states[point].float().numpy().astype(dtype)


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_npy(store: Crafted, tmp_path: Path, float32: bool, rows_at_once: int) -> None:
    dtype = np.float32 if float32 else NUMPY[store.manifest.stored_dtype]
    done: list[tuple[int, int]] = []
    out = tmp_path / "deep" / "out"
    exported = export(
        store.path,
        out,
        to="npy",
        float32=float32,
        block_bytes=rows_at_once * 6 * np.dtype(dtype).itemsize,
        report=lambda *bytes: done.append(bytes),
    )
    names = {f"{name}.npy" for name in (*TOKENS, *map(str, POINTS))} | {"documents.jsonl", "export.json"}
    assert {file.name for file in out.iterdir()} == names
    for point in POINTS:
        array = np.load(out / f"{point}.npy", mmap_mode="r")
        assert array.dtype == dtype
        assert np.array_equal(array, expected(store, point, dtype))
    for name in TOKENS:
        array = np.load(out / f"{name}.npy")
        assert array.dtype == np.int32
        assert np.array_equal(array, getattr(store, name))
    documents = [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]
    assert [document["rows"] for document in documents] == list(store.lengths)
    assert documents[2] == {"id": "doc-2", "source": "file 2.txt", "first_row": 3, "rows": 7}
    total = store.rows * 6 * np.dtype(dtype).itemsize * len(POINTS)
    assert done[-1] == (total, total)
    assert (exported.states, exported.files, exported.dtype) == (store.rows, len(names), np.dtype(dtype).name)
    assert exported.bytes == sum(file.stat().st_size for file in out.iterdir())


@pytest.mark.parametrize("float32", [False, True])
def test_parquet(store: Crafted, tmp_path: Path, float32: bool) -> None:
    dtype = np.float32 if float32 else NUMPY[store.manifest.stored_dtype]
    row_bytes = len(POINTS) * 6 * np.dtype(dtype).itemsize
    out = tmp_path / "out"
    export(store.path, out, to="parquet", float32=float32, block_bytes=4 * row_bytes, file_bytes=10 * row_bytes)
    files = sorted(out.glob("*.parquet"))
    assert [pq.ParquetFile(file).metadata.num_rows for file in files] == [10, 10, 10, 4]
    groups = pq.ParquetFile(files[0]).metadata
    assert [groups.row_group(k).num_rows for k in range(groups.num_row_groups)] == [4, 4, 2]
    table = pa.concat_tables(map(pq.read_table, files))
    for point in POINTS:
        column = table.column(str(point))
        assert column.type == pa.list_(pa.float16() if dtype is np.float16 else pa.float32(), 6)
        values = np.concatenate([chunk.flatten().to_numpy().reshape(-1, 6) for chunk in column.chunks])
        assert np.array_equal(values, expected(store, point, dtype))
    assert table.column("row").to_pylist() == list(range(store.rows))
    for name in TOKENS:
        assert table.column(name).to_pylist() == getattr(store, name).tolist()
    assert table.column("document_id").to_pylist() == [f"doc-{number}" for number in store.document]
    labels = table.schema.field("final_norm").metadata
    assert (labels[b"norm"], b"after the final norm" in labels[b"meaning"]) == (b"after", True)


@pytest.mark.parametrize("to", ["npy", "parquet"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_kept_rows_and_other_shapes(tmp_path: Path, to: str, dtype: str) -> None:
    store, out = craft_version_2(tmp_path / "store", dtype=dtype), tmp_path / "out"
    done: list[tuple[int, int]] = []
    exported = export(store.path, out, to=to, block_bytes=200, file_bytes=700, report=lambda *bytes: done.append(bytes))
    assert exported.states == len(KEPT)
    widths = [int(np.prod(SHAPES.get(point, (6,)))) for point in store.states]
    assert done[-1] == (len(KEPT) * 4 * sum(widths),) * 2
    tokens = {"row": list(KEPT)} | {name: getattr(store, name)[list(KEPT)].tolist() for name in TOKENS}
    if to == "parquet":
        table = pa.concat_tables(map(pq.read_table, sorted(out.glob("*.parquet"))))
        assert {name: table.column(name).to_pylist() for name in tokens} == tokens
        arrays = {point: np.array(table.column(str(point)).to_pylist(), np.float32) for point in store.states}
    else:
        assert {name: np.load(out / f"{name}.npy").tolist() for name in tokens} == tokens
        arrays = {point: np.load(out / f"{point}.npy") for point in store.states}
        assert [arrays[point].shape for point in SHAPES] == [(len(KEPT), *shape) for shape in SHAPES.values()]
    for point, array in arrays.items():
        assert np.array_equal(array.reshape(len(KEPT), -1), expected(store, point, np.float32))
    said = json.loads((out / "export.json").read_text())
    assert (said["rows"], said["states"], said["pooling"]) == (store.rows, len(KEPT), "last")
    assert [point["shape"] for point in said["hook_points"]] == [[6], [3, 4], [2, 5], [11], [6], [6]]


def test_the_library_datasets_reads_it(store: Crafted, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export(store.path, tmp_path / "out", to="parquet", float32=True)
    files = sorted(map(str, (tmp_path / "out").glob("*.parquet")))
    loaded = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"), keep_in_memory=True)
    rows = loaded.with_format("numpy")[:]
    assert np.array_equal(rows["resid_post@3"], expected(store, POINTS[2], np.float32))
    assert rows["document_id"].tolist() == [f"doc-{number}" for number in store.document]


def test_it_says_what_it_holds(store: Crafted, tmp_path: Path) -> None:
    export(store.path, tmp_path / "out", to="npy", hook_points=["final_norm", "embed"])
    said = json.loads((tmp_path / "out/export.json").read_text())
    assert [(point["name"], point["norm"], point["files"]) for point in said["hook_points"]] == [
        ("final_norm", "after", ["final_norm.npy"]),
        ("embed", "before", ["embed.npy"]),
    ]
    assert said["dtypes"]["stored"] == store.manifest.stored_dtype
    assert {file.stem for file in (tmp_path / "out").glob("*.npy")} == {"final_norm", "embed", *TOKENS}


@pytest.mark.parametrize("to", ["npy", "parquet"])
def test_nan_and_infinite_values_stay_what_they_are(tmp_path: Path, to: str) -> None:
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.0])
    made = craft(tmp_path / "store", points=POINTS[:1], values=lambda rows, hidden: np.tile(odd, (rows, 1)))
    export(made.path, tmp_path / "out", to=to)
    if to == "npy":
        values = np.load(tmp_path / "out/embed.npy")
    else:
        column = pq.read_table(tmp_path / "out/data-00000.parquet").column("embed").combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, 6)
    assert values.tobytes() == made.states[POINTS[0]].numpy().tobytes()


@pytest.mark.parametrize("to", ["npy", "parquet"])
def test_a_store_without_rows(tmp_path: Path, to: str) -> None:
    made = craft(tmp_path / "store", parts=(((0, 0), 5),))
    exported = export(made.path, tmp_path / "out", to=to)
    assert exported.states == 0
    if to == "npy":
        assert np.load(tmp_path / "out/embed.npy").shape == (0, 6)
    else:
        assert pq.read_table(tmp_path / "out/data-00000.parquet").num_rows == 0


@pytest.mark.parametrize("to", ["npy", "parquet"])
def test_memory_is_that_of_a_block(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = craft(tmp_path / "store", parts=(((2000,), 300),), hidden_size=8, points=POINTS[:2])
    sizes = []

    def read(self: Store, rows: range, views: Any, read: Callable[..., Any] = Store.read) -> Any:
        sizes.append(len(rows) * len(list(views)))
        return read(self, rows, views)

    monkeypatch.setattr(Store, "read", read)
    export(made.path, tmp_path / "out", to=to, block_bytes=64 * 8 * 4)
    assert max(sizes) <= 64
    assert sum(sizes) == 2 * 2000


def tmp_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_cannot_be_done(store: Crafted, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    before = tmp_names(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"to": "npy"}, "`--out` must not be there yet"),
        ({"to": "csv"}, "`--to` must be one of parquet, npy, but is 'csv'"),
    ]
    for options, message in cases:
        with pytest.raises(StoreError, match=message):
            export(store.path, tmp_path / "out", **options)
    with pytest.raises(UnknownHookPointError, match="must be one that"):
        export(store.path, tmp_path / "new", to="npy", hook_points=["resid_post@9"])
    with pytest.raises(StoreNotFoundError):
        export(tmp_path / "none", tmp_path / "new", to="npy")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"`--out` must be a folder that can be made and written \(Not a directory\)"):
        export(store.path, tmp_path / "file" / "new", to="npy")
    assert tmp_names(tmp_path) == {*before, "file"}


@pytest.mark.parametrize("to", ["npy", "parquet"])
def test_a_full_disk(store: Crafted, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(export_module.os, "fsync", full)
        with pytest.raises(StoreError, match=r"`--out` must have room for the store \(No space left on device"):
            export(store.path, tmp_path / "out", to=to)
    assert tmp_names(tmp_path) == set()
    monkeypatch.setattr(export_module, "_check_space", lambda *_: None)
    export(store.path, tmp_path / "out", to=to)


def test_no_room_is_said_before_anything_is_written(
    store: Crafted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"`--out` must be on a disk with .* free, and 100 B are free there"):
        export(store.path, tmp_path / "a" / "out", to="npy")
    assert tmp_names(tmp_path) == set()


def test_a_damaged_store_leaves_nothing(tmp_path: Path) -> None:
    made = craft(tmp_path / "store")
    os.truncate(made.path / "final_norm/000001.safetensors", 100)
    with pytest.raises(StoreError, match="final_norm/000001"):
        export(made.path, tmp_path / "out", to="npy")
    assert tmp_names(tmp_path) == {"store"}
