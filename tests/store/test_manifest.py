"""The manifest: there and back, what is unknown kept, what is wrong named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import HookPointEntry, ShardEntry, TokenPart
from nemo_qwen_hidden.store.manifest import Manifest


def entry(point: HookPoint) -> HookPointEntry:
    shards = tuple(
        ShardEntry(file=f"{point}/{k:06d}.safetensors", first_row=5 * k, rows=rows, bytes=100)
        for k, rows in enumerate((5, 5, 2))
    )
    bare = HookPointEntry.of(point, num_layers=4)
    return HookPointEntry(
        point=point, meaning=bare.meaning, norm=bare.norm, huggingface_index=bare.huggingface_index, shards=shards
    )


MANIFEST = Manifest(
    rows=12,
    documents=2,
    hidden_size=6,
    shard_rows=5,
    compute_dtype="fp32",
    stored_dtype="bf16",
    hook_points=(entry(HookPoint("resid_post", 3)), entry(HookPoint("final_norm"))),
    tokens=(
        TokenPart(
            file="tokens/000000.safetensors",
            documents_file="tokens/000000.documents.jsonl",
            first_row=0,
            rows=12,
            first_document=0,
            documents=2,
            bytes=500,
        ),
    ),
    model={"path": "tiny", "config": {"a": [1, None]}},
)


def test_there_and_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert Manifest.from_json(MANIFEST.to_json()).to_json() == MANIFEST.to_json()


def test_both_numberings_and_the_norm_are_written_down() -> None:
    data = json.loads(MANIFEST.to_json())
    assert (data["format"], data["version"]) == ("nemo_qwen_hidden.store", 1)
    assert data["dtypes"] == {"compute": "fp32", "stored": "bf16"}
    last, final = data["hook_points"]
    assert (last["name"], last["site"], last["layer"]) == ("resid_post@3", "resid_post", 3)
    assert (last["norm"], last["huggingface_index"]) == ("before", None)
    assert (final["norm"], final["huggingface_index"], final["layer"]) == ("after", 4, None)
    assert "before the final norm" in last["meaning"] and "after the final norm" in final["meaning"]
    assert last["shards"][2] == {"file": "resid_post@3/000002.safetensors", "first_row": 10, "rows": 2, "bytes": 100}


def test_what_a_later_release_adds_is_kept() -> None:
    data = json.loads(MANIFEST.to_json())
    data["statistics"] = {"mean": 1.5}
    data["dtypes"]["scales"] = "fp16"
    data["hook_points"][0]["quantiles"] = [1, 2]
    data["hook_points"][0]["shards"][1]["sha256"] = "ab"
    data["tokens"][0]["sha256"] = "cd"
    text = json.dumps(data).encode()
    assert json.loads(Manifest.from_json(text).to_json()) == data


def test_a_site_of_a_later_release_can_be_listed() -> None:
    data = json.loads(MANIFEST.to_json())
    data["hook_points"][0] |= {"name": "attn_out@3", "site": "attn_out"}
    assert Manifest.from_json(json.dumps(data).encode()).hook_points[0].point == HookPoint("attn_out", 3)


def at(*path: str | int) -> Callable[[dict[str, Any], Any], None]:
    def put(data: Any, value: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return put


POINT, SHARD, PART = ("hook_points", 0), ("hook_points", 0, "shards", 1), ("tokens", 0)


@pytest.mark.parametrize(
    ("put", "value", "message"),
    [
        (at("format"), "zarr", "`manifest.json: format` must be one of nemo_qwen_hidden.store, but is 'zarr'"),
        (
            at("version"),
            2,
            "`manifest.json: version` must be one that this release of nemo_qwen_hidden reads (1), but is 2",
        ),
        (at("version"), "1", "`manifest.json: version` must be an integer"),
        (at("rows"), 12.0, "`manifest.json: rows` must be an integer of at least 0, but is 12.0"),
        (at("rows"), True, "`manifest.json: rows` must be an integer of at least 0, but is True"),
        (at("rows"), -1, "`manifest.json: rows` must be an integer of at least 0, but is -1"),
        (at("rows"), 2**70, "`manifest.json: rows` must be an integer"),
        (at("rows"), 99, "`manifest.json: hook_points[0].shards` must list 20 shards"),
        (at("hidden_size"), 0, "`manifest.json: hidden_size` must be an integer of at least 1"),
        (at("shard_rows"), 0, "`manifest.json: shard_rows` must be an integer of at least 1"),
        (at("documents"), 3, "`manifest.json: tokens` must hold 12 rows and 3 documents in all, but is '12 and 2'"),
        (at("dtypes"), [], "`manifest.json: dtypes` must be an object"),
        (at("dtypes", "stored"), "fp8", "`manifest.json: dtypes.stored` must be one of fp32, bf16, fp16, but is 'fp8'"),
        (at("model"), "x", "`manifest.json: model` must be an object, but is 'x'"),
        (at("hook_points"), {}, "`manifest.json: hook_points` must be a list"),
        (at(*POINT), 7, "`manifest.json: hook_points[0]` must be an object, but is 7"),
        (at(*POINT, "name"), "resid_post@4", "`manifest.json: hook_points[0].name` must be made of site"),
        (at(*POINT, "name"), "../x", "`manifest.json: hook_points[0].name` must be made of site"),
        (at(*POINT, "layer"), "3", "`manifest.json: hook_points[0].layer` must be an integer"),
        (at(*POINT, "norm"), "none", "`manifest.json: hook_points[0].norm` must be one of before, after"),
        (at(*POINT, "huggingface_index"), 1.5, "hook_points[0].huggingface_index` must be an integer"),
        (at(*SHARD, "file"), "/etc/passwd", "shards[1].file` must be a plain path inside the store's folder"),
        (at(*SHARD, "file"), "../x", "must be a plain path inside the store's folder, but is '../x'"),
        (at(*SHARD, "file"), "a/../../x", "must be a plain path inside the store's folder"),
        (at(*SHARD, "file"), "a//b", "must be a plain path inside the store's folder"),
        (at(*SHARD, "file"), "", "must be a plain path inside the store's folder"),
        (at(*SHARD, "file"), "a\0b", "must be a plain path inside the store's folder"),
        (at(*SHARD, "file"), "..\\x", "must be a plain path inside the store's folder"),
        (at(*SHARD, "first_row"), 6, "hook_points[0].shards[1]` must hold rows 5 to 9, but is '6 to 10'"),
        (at(*SHARD, "rows"), 4, "hook_points[0].shards[1]` must hold rows 5 to 9, but is '5 to 8'"),
        (at(*PART, "file"), "../x", "`manifest.json: tokens[0].file` must be a plain path"),
        (at(*PART, "first_row"), 1, "`manifest.json: tokens[0]` must start at row 0 and document 0"),
        (at(*PART, "rows"), 11, "`manifest.json: tokens` must hold 12 rows and 2 documents"),
    ],
)
def test_what_is_wrong_is_named(put: Callable[[dict[str, Any], Any], None], value: object, message: str) -> None:
    data = json.loads(MANIFEST.to_json())
    put(data, value)
    with pytest.raises(StoreError) as caught:
        Manifest.from_json(json.dumps(data).encode())
    assert message in str(caught.value)


def test_hook_points_are_listed_once() -> None:
    data = json.loads(MANIFEST.to_json())
    data["hook_points"].append(data["hook_points"][0])
    with pytest.raises(StoreError, match="must name each hook point once"):
        Manifest.from_json(json.dumps(data).encode())


FIELDS = list(json.loads(MANIFEST.to_json()))


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_missing_is_named(name: str) -> None:
    data = json.loads(MANIFEST.to_json())
    del data[name]
    with pytest.raises(StoreError, match=f"manifest.json: {name}` must be there, but is 'missing'"):
        Manifest.from_json(json.dumps(data).encode())


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b"[" * 200_000, b'{"rows": Infinity}', b'{"a":1,"a":2}'])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Manifest.from_json(text)


@given(st.data())
def test_a_damaged_manifest_is_refused_or_means_something_consistent(data: st.DataObject) -> None:
    text = bytearray(MANIFEST.to_json())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] = data.draw(st.integers(0, 255))
    try:
        found = Manifest.from_json(bytes(text))
    except StoreError:
        return
    assert Manifest.from_json(found.to_json()) == found


def test_files_named_in_errors_are_whole_paths(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path}/manifest.json: format"):
        Manifest.from_json(b"{}", str(tmp_path / "manifest.json"))


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_provenance_must_be_json(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        replace(MANIFEST, data={"x": value}).to_json()
