"""The manifest: there and back, what is unknown kept, what is wrong named."""

import hashlib
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
from nemo_qwen_hidden.store.entries import FileEntry, HookPointEntry, Part, ShardEntry
from nemo_qwen_hidden.store.fields import Fields
from nemo_qwen_hidden.store.manifest import NO_DIGEST, Manifest
from nemo_qwen_hidden.store.statistics import ShardStatistics, StoredError

STATISTICS = ShardStatistics(rows=5, nan=0, inf=0, max_abs=2.5, max_abs_row=1, min_norm=0.5, max_norm=3.0)
SHARDS = ((0, 0, 5), (1, 5, 5), (2, 10, 2), (3, 12, 3))  # number, first row, rows


def file(name: str) -> FileEntry:
    return FileEntry(file=name, bytes=100, sha256=hashlib.sha256(name.encode()).hexdigest())


def entry(point: HookPoint) -> HookPointEntry:
    shards = tuple(
        ShardEntry(
            **{**vars(file(f"{point}/{k:06d}.safetensors")), "first_row": first_row, "rows": rows},
            statistics=STATISTICS,
            error=StoredError(rows=rows, units=7, max=0.25),
        )
        for k, first_row, rows in SHARDS
    )
    return replace(HookPointEntry.of(point, num_layers=4, shards=4, shape=(6,)), shards=shards)


def part(number: int, **sizes: int) -> Part:
    names = (f"tokens/{number:06d}.safetensors", f"tokens/{number:06d}.documents.jsonl")
    return Part(**sizes, tokens=file(names[0]), lines=file(names[1]), data={"sha256": "ab", "max_tokens": 9})


MANIFEST = Manifest(
    hidden_size=6,
    compute_dtype="fp32",
    stored_dtype="bf16",
    hook_points=(entry(HookPoint("resid_post", 3)), entry(HookPoint("final_norm"))),
    parts=(
        part(0, first_row=0, rows=12, first_document=0, documents=2, shard_rows=5),
        part(1, first_row=12, rows=3, first_document=2, documents=1, shard_rows=4),
    ),
    final_norm=file("final_norm.safetensors"),
    model={"path": "tiny", "config": {"a": [1, None]}},
    tokenizer={"sha256": None},
    producers=({"work": "new store"}, {"work": "documents added"}),
)


def signed(data: dict[str, Any]) -> bytes:
    """As JSON, with the digest that fits."""
    blank = json.dumps(data | {"sha256": NO_DIGEST}).encode()
    return blank.replace(NO_DIGEST.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def unsigned(text: bytes) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(text)
    del data["sha256"]
    return data


def test_there_and_back() -> None:
    found = Manifest.from_json(MANIFEST.to_json())
    assert found == MANIFEST
    assert found.to_json() == MANIFEST.to_json()
    assert (found.rows, found.documents, found.grid.shards) == (15, 3, 4)
    assert [found.grid.states_of(shard) for shard in range(4)] == [range(f, f + n) for _, f, n in SHARDS]


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place() -> None:
    text = MANIFEST.to_json()
    digest = json.loads(text)["sha256"].encode()
    assert hashlib.sha256(text.replace(digest, b"0" * 64)).hexdigest().encode() == digest


def test_whatever_is_changed_is_noticed() -> None:
    text = MANIFEST.to_json()
    with pytest.raises(StoreError, match=r"manifest.json: sha256` must be [0-9a-f]{64}: the file was changed"):
        Manifest.from_json(text.replace(b"tiny", b"tidy"))


def test_a_missing_shard_makes_no_manifest_but_a_target() -> None:
    gap = replace(MANIFEST.hook_points[1], shards=(*MANIFEST.hook_points[1].shards[:2], None, None))
    target = replace(MANIFEST, hook_points=(MANIFEST.hook_points[0], gap))
    assert list(target.missing()) == [(HookPoint("final_norm"), 2), (HookPoint("final_norm"), 3)]
    assert Manifest.parse(Fields(json.loads(json.dumps(target.as_dict())), file="f"), 1) == target
    with pytest.raises(StoreError, match="must list every shard, but is 'no shard 2 of final_norm' instead"):
        Manifest.from_json(target.to_json())


def test_both_numberings_and_the_norm_are_written_down() -> None:
    data = json.loads(MANIFEST.to_json())
    assert (data["format"], data["version"]) == ("nemo_qwen_hidden.store", 1)
    assert data["dtypes"] == {"compute": "fp32", "stored": "bf16"}
    last, final = data["hook_points"]
    assert (last["name"], last["site"], last["layer"]) == ("resid_post@3", "resid_post", 3)
    assert (last["norm"], last["huggingface_index"]) == ("before", None)
    assert (final["norm"], final["huggingface_index"], final["layer"]) == ("after", 4, None)
    assert "before the final norm" in last["meaning"] and "after the final norm" in final["meaning"]
    assert last["shards"][2]["file"] == "resid_post@3/000002.safetensors"
    assert (last["shards"][2]["first_row"], last["shards"][2]["rows"]) == (10, 2)


def test_what_a_later_release_adds_is_kept() -> None:
    data = unsigned(MANIFEST.to_json())
    data["colour"] = {"mean": 1.5}
    data["dtypes"]["scales"] = "fp16"
    data["hook_points"][0]["quantiles"] = [1, 2]
    data["hook_points"][0]["shards"][1]["blake3"] = "ab"
    data["hook_points"][0]["shards"][1]["statistics"]["median"] = 1
    data["hook_points"][0]["shards"][1]["error"]["median"] = 1
    data["parts"][0]["language"] = "en"
    data["parts"][0]["tokens"]["codec"] = None
    data["producers"][0]["mood"] = "good"
    assert unsigned(Manifest.from_json(signed(data)).to_json()) == data


def test_a_site_of_a_later_release_can_be_listed() -> None:
    data = json.loads(MANIFEST.to_json())
    data["hook_points"][0] |= {"name": "attn_out@3", "site": "attn_out"}
    assert Manifest.from_json(signed(data)).points[0] == HookPoint("attn_out", 3)


def at(*path: str | int) -> Callable[[dict[str, Any], Any], None]:
    def put(data: Any, value: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return put


POINT, SHARD, PART = ("hook_points", 0), ("hook_points", 0, "shards", 1), ("parts", 0)


@pytest.mark.parametrize(
    ("put", "value", "message"),
    [
        (at("format"), "zarr", "`manifest.json: format` must be one of nemo_qwen_hidden.store, but is 'zarr'"),
        (
            at("version"),
            3,
            "`manifest.json: version` must be one that this release of nemo_qwen_hidden reads (1, 2), but is 3",
        ),
        (at("version"), "1", "`manifest.json: version` must be an integer"),
        (at("rows"), 12.0, "`manifest.json: rows` must be an integer of at least 0, but is 12.0"),
        (at("rows"), True, "`manifest.json: rows` must be an integer of at least 0, but is True"),
        (at("rows"), -1, "`manifest.json: rows` must be an integer of at least 0, but is -1"),
        (at("rows"), 2**70, "`manifest.json: rows` must be an integer"),
        (at("rows"), 99, "`manifest.json: rows` must be 15, as the parts say, but is 99"),
        (at("documents"), 4, "`manifest.json: documents` must be 3, as the parts say, but is 4"),
        (at("hidden_size"), 0, "`manifest.json: hidden_size` must be an integer of at least 1"),
        (at(*PART, "shard_rows"), 0, "`manifest.json: parts[0].shard_rows` must be an integer of at least 1"),
        (at(*PART, "shard_rows"), 1, "`manifest.json: hook_points[0].shards` must list 13 shards"),
        (at(*PART, "rows"), 2**62, "`manifest.json: parts[1]` must start at row 4611686018427387904"),
        (at("dtypes"), [], "`manifest.json: dtypes` must be an object"),
        (at("dtypes", "stored"), "fp8", "`manifest.json: dtypes.stored` must be one of fp32, bf16, fp16, int8, but is"),
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
        (at(*SHARD, "first_row"), 6, "hook_points[0].shards[1]` must hold states 5 to 9, but is '6 to 10'"),
        (at(*SHARD, "rows"), 4, "hook_points[0].shards[1]` must hold states 5 to 9, but is '5 to 8'"),
        (at(*SHARD, "sha256"), "ab", "shards[1].sha256` must be 64 hexadecimal digits, but is 'ab'"),
        (at(*SHARD, "sha256"), None, "shards[1].sha256` must be a string"),
        (at(*SHARD, "statistics", "nan"), -1, "shards[1].statistics.nan` must be an integer of at least 0"),
        (at(*SHARD, "statistics", "max_abs"), "1", "shards[1].statistics.max_abs` must be a number of at least 0"),
        (at(*SHARD, "error", "max"), -0.5, "shards[1].error.max` must be a number of at least 0, but is -0.5"),
        (at(*SHARD), None, "`manifest.json: hook_points` must list every shard, but is 'no shard 1 of resid_post@3'"),
        (at(*SHARD, "file"), "resid_post@3/000000.safetensors", "must name each file once"),
        (at(*PART, "tokens", "file"), "../x", "`manifest.json: parts[0].tokens.file` must be a plain path"),
        (at(*PART, "first_row"), 1, "`manifest.json: parts[0]` must start at row 0 and document 0"),
        (at(*PART, "rows"), 11, "`manifest.json: parts[1]` must start at row 11 and document 2, but is '12 and 2'"),
        (at("final_norm", "file"), "/x", "`manifest.json: final_norm.file` must be a plain path"),
        (at("hook_points"), [], "`manifest.json: hook_points` must name each hook point once"),
        (at("producers"), [1], "`manifest.json: producers[0]` must be an object"),
    ],
)
def test_what_is_wrong_is_named(put: Callable[[dict[str, Any], Any], None], value: object, message: str) -> None:
    data = json.loads(MANIFEST.to_json())
    put(data, value)
    with pytest.raises(StoreError) as caught:
        Manifest.from_json(signed(data))
    assert message in str(caught.value)


def test_hook_points_are_listed_once() -> None:
    data = json.loads(MANIFEST.to_json())
    data["hook_points"].append(data["hook_points"][0])
    with pytest.raises(StoreError, match="must name each hook point once"):
        Manifest.from_json(signed(data))


FIELDS = [name for name in json.loads(MANIFEST.to_json()) if name != "final_norm"]


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_missing_is_named(name: str) -> None:
    data = json.loads(MANIFEST.to_json())
    del data[name]
    text = json.dumps(data).encode() if name == "sha256" else signed(data)
    with pytest.raises(StoreError, match=f"manifest.json: {name}` must be there, but is 'missing'"):
        Manifest.from_json(text)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b"[" * 200_000, b'{"rows": Infinity}', b'{"a":1,"a":2}'])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Manifest.from_json(text)


@given(st.data())
def test_a_damaged_manifest_is_refused(data: st.DataObject) -> None:
    text = bytearray(MANIFEST.to_json())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] = data.draw(st.integers(0, 255))
    if bytes(text) != MANIFEST.to_json():
        with pytest.raises(StoreError):
            Manifest.from_json(bytes(text))


@given(st.data())
def test_a_damaged_and_signed_manifest_is_refused_or_means_something_consistent(data: st.DataObject) -> None:
    text = json.dumps(unsigned(MANIFEST.to_json()))
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters(codec="ascii")) + text[place + 1 :]
    try:
        values = json.loads(changed)
    except ValueError:
        return
    if not isinstance(values, dict):
        return
    try:
        found = Manifest.from_json(signed(values))
    except StoreError:
        return
    assert Manifest.from_json(found.to_json()) == found


def test_files_named_in_errors_are_whole_paths(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path}/manifest.json: format"):
        Manifest.from_json(b"{}", str(tmp_path / "manifest.json"))


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_provenance_must_be_json(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        replace(MANIFEST, model={"x": value}).to_json()
