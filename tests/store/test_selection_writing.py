"""Stores of kept rows and of states of any shape, written: the same as the full store cut afterwards.

And where neither is used, the same bytes as before.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nemo_qwen_hidden.errors import CoverageError, StoreError, UserError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import HookPointEntry, Part
from nemo_qwen_hidden.store.fields import Fields
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.read.tokens import PartTokens, TokenTable
from nemo_qwen_hidden.store.upkeep.merge import merge
from nemo_qwen_hidden.store.upkeep.repair import repair
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.store.write import place, session
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter
from nemo_qwen_hidden.store.write.writer import ShardWriter
from tests.store.crafted import craft_version_2, rewrite
from tests.store.helpers import LAYERS, Run, draft, finish, make_store, tree

SHAPES = {HookPoint("embed"): (6,), HookPoint("k", 2): (2, 3, 2), HookPoint("mlp_act", 2): (13,)}
LENGTHS = (3, 0, 7, 1, 12)
KEPT = ((2,), (), (0, 3, 6), (), (1, 2, 3, 4, 11))
ROWS = [2, 3, 6, 9, 12, 13, 14, 15, 22]
RULE = {"every": 3}


def table(
    folder: Path,
    kept: tuple[tuple[int, ...], ...] | None = KEPT,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    name: str = "d",
) -> Part:
    with TokenTableWriter(folder, shard_rows=4) as writer:
        for number, length in enumerate(lengths):
            ids = np.arange(length, dtype=np.int32) + 10 * number
            places = None if kept is None else np.array(kept[number], np.int64)
            writer.append(document_id=f"{name}{number}", source="s", token_ids=ids, kept=places)
    return writer.close()


def target_of(part: Part, dtype: str = "fp32", **changes: Any) -> Manifest:
    manifest = draft(part, stored_dtype=dtype, hook_points=(), **changes)
    entries = (
        HookPointEntry.of(point, num_layers=LAYERS, shards=manifest.grid.shards, shape=shape)
        for point, shape in SHAPES.items()
    )
    return replace(manifest, hook_points=tuple(entries))


def truth(rows: int = sum(LENGTHS), seed: int = 0) -> dict[HookPoint, torch.Tensor]:
    """Of the full store."""
    generator = torch.Generator().manual_seed(seed)
    return {point: torch.randn(rows, prod(shape), generator=generator) for point, shape in SHAPES.items()}


def begin(path: Path, dtype: str = "fp32", **changes: Any) -> Manifest:
    """A store of ``KEPT`` that is to be made."""
    with place.locked(path), session.staging(path) as staged:
        target = target_of(replace(table(staged), selection=RULE), dtype, **changes)
        session.start(path, target, {}, staged=staged)
    return target


def write_rows(
    path: Path, target: Manifest, rows: list[tuple[int, int]], states: dict[HookPoint, torch.Tensor]
) -> None:
    """Runs these windows of rows, of which the kept ones are written, as a job does."""
    tokens, (_, done) = TokenTable(path, target.parts), session.progress(path, target)
    with ShardWriter(path, target, rank=0, done=done) as writer:
        for first_row, length in rows:
            places = tokens.states_of(first_row, length)
            kept = tokens.kept_rows(first_row, length)
            for point, values in states.items():
                writer.write(point, [Run(places.start, len(places))], values[kept])


def made(path: Path, dtype: str = "fp32", seed: int = 0) -> Path:
    target = begin(path, dtype)
    write_rows(path, target, [(0, 23)], truth(seed=seed))
    with place.locked(path):
        finish(path, target)
    return path


def test_the_table_says_which_rows_are_kept(tmp_path: Path) -> None:
    part = table(tmp_path)
    found = load_file(tmp_path / part.tokens.file)
    assert (part.kept, part.states, found["kept"].dtype, found["kept"].tolist()) == (9, 9, np.int64, ROWS)
    tokens = PartTokens(tmp_path, part)
    assert (tokens.rows, tokens.states) == (23, 9) and tokens.kept is not None and tokens.kept.tolist() == ROWS
    assert tokens.states_of(3, 10) == range(1, 5) and tokens.kept_rows(3, 10).tolist() == [3, 6, 9, 12]
    (tmp_path / "full").mkdir()
    full = table(tmp_path / "full", None)
    others = load_file(tmp_path / "full" / full.tokens.file)
    assert {name: column.tolist() for name, column in found.items() if name != "kept"} == {
        name: column.tolist() for name, column in others.items()
    }
    assert (full.kept, full.lines.sha256) == (None, part.lines.sha256)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [
        "000000.documents.jsonl",
        "000000.safetensors",
    ]


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (np.array([0, 0]), r"kept must ascend within 0 to 2, but is \[0 0\]"),
        (np.array([2, 1]), "kept must ascend"),
        (np.array([-1]), "kept must ascend"),
        (np.array([3]), "kept must ascend"),
        (np.array([1], np.int32), r"kept must be int64 \[kept tokens\], but is int32 \[1\]"),
        (np.array([[1]]), r"kept must be int64 \[kept tokens\], but is int64 \[1, 1\]"),
        (None, "kept must be given with every document of a part, or with none"),
    ],
)
def test_what_cannot_be_kept(tmp_path: Path, kept: NDArray[Any] | None, said: str) -> None:
    ids = np.arange(3, dtype=np.int32)
    with TokenTableWriter(tmp_path, shard_rows=5) as writer:
        writer.append(document_id="a", source="s", token_ids=ids, kept=np.array([1]))
        with pytest.raises(ValueError, match=said):
            writer.append(document_id="b", source="s", token_ids=ids, kept=kept)
        writer.append(document_id="c", source="s", token_ids=ids, kept=np.array([], np.int64))
    assert (writer.close().kept, writer.close().rows) == (1, 6)
    with TokenTableWriter(tmp_path, shard_rows=5) as writer:
        writer.append(document_id="a", source="s", token_ids=ids)
        with pytest.raises(ValueError, match="or with none"):
            writer.append(document_id="b", source="s", token_ids=ids, kept=np.array([1]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_it_is_the_full_store_cut_afterwards(tmp_path: Path, dtype: str) -> None:
    path, full = made(tmp_path / "kept", dtype), tmp_path / "full"
    with place.locked(full):
        with session.staging(full) as staged:
            target = target_of(table(staged, None), dtype)
            session.start(full, target, {}, staged=staged)
        write_rows(full, target, [(0, 23)], truth())
        finish(full, target)
    assert verify(path, full=True).findings == verify(full, full=True).findings == ()
    kept, everything = open_store(path), open_store(full)
    assert (kept.manifest.version, everything.manifest.version) == (2, 2)
    assert kept.row_of_states(slice(None)).tolist() == ROWS
    for point, shape in SHAPES.items():
        assert kept[point].state_shape == shape and torch.equal(kept[point][:], everything[point][:][ROWS])
        values = everything[point][:][ROWS].double()
        assert np.allclose(kept.statistics(point).mean, values.mean(dim=0), atol=1e-9)
        if dtype != "fp32":
            error = kept[point].error()
            assert error is not None and error.rows == len(ROWS) and 0 < error.rms < 0.02
    sizes = [sum(shard.bytes for shard in store.manifest.hook_points[2].present) for store in (kept, everything)]
    assert sizes[0] < sizes[1]


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_any_order_and_any_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Windows of rows in any order, over several processes of which each goes on where the others stopped."""
    path = tmp_path_factory.mktemp("any") / "store"
    cuts = sorted({0, 23, *data.draw(st.sets(st.integers(1, 22)))})
    windows = data.draw(st.permutations([(start, stop - start) for start, stop in pairwise(cuts)]))
    crash = data.draw(st.integers(0, len(windows)))
    target = begin(path)
    write_rows(path, target, windows[:crash], truth())
    with place.locked(path):
        found = session.find(path).unfinished
        assert found == target
        session.resume(path, found, {})
        if any(row in range(first, first + length) for first, length in windows[crash:] for row in ROWS):
            with pytest.raises(CoverageError, match="were not written"):
                session.to_seal(path, target)
    write_rows(path, target, windows, truth())  # what is there is passed over
    with place.locked(path):
        finish(path, target)
    assert {name: tree(path)[name] for name in tree(path)} == tree(made(path.parent / "at once"))


def test_an_unfinished_store_says_its_version(tmp_path: Path) -> None:
    begin(tmp_path / "store")
    marker = tmp_path / "store/unfinished.json"
    text = marker.read_text()
    assert json.loads(text)["version"] == 2
    marker.write_text(text.replace('"version": 2', '"version": 1', 1))
    with pytest.raises(StoreError, match="must not be in a manifest of version 1"):
        session.find(tmp_path / "store")


def test_states_of_another_width_or_outside(tmp_path: Path) -> None:
    path = tmp_path / "store"
    target = begin(path)
    with ShardWriter(path, target, rank=0) as writer:
        for run, width, said in (
            (Run(0, 9), 6, r"values of k@2 must be \[9, 12\], as its entry and these runs say, but are \[9, 6\]"),
            (Run(0, 10), 12, r"states 0 \+ 10 do not lie within 9"),
        ):
            with pytest.raises(ValueError, match=said):
                writer.write(HookPoint("k", 2), [run], torch.zeros(run.length, width))
        with pytest.raises(StoreError, match="must give finite values; k@2 state 4 has others"):
            values = torch.zeros(9, 12)
            values[4, 3] = torch.nan
            writer.write(HookPoint("k", 2), [Run(0, 9)], values)


def test_hook_points_are_added_for_the_kept_rows(tmp_path: Path) -> None:
    path = made(tmp_path / "store")
    point, values = HookPoint("v", 3), torch.randn(9, 4)
    with place.locked(path):
        found = session.find(path).finished
        assert found is not None
        entry = HookPointEntry.of(point, num_layers=LAYERS, shards=found.grid.shards, shape=(2, 2))
        target = replace(found, hook_points=(*found.hook_points, entry))
        session.start(path, target, {}, fresh=False)
        with ShardWriter(path, target, rank=0, done=session.progress(path, target)[1]) as writer:
            writer.write(point, [Run(0, 9)], values)
        finish(path, target)
    store = open_store(path)
    assert torch.equal(store[point][:], values) and store.row_of_states(slice(None)).tolist() == ROWS
    assert torch.equal(store["embed"][:], truth()[HookPoint("embed")][ROWS])
    assert verify(path, full=True).findings == ()


def test_a_damaged_shard_is_made_anew(tmp_path: Path) -> None:
    path = made(tmp_path / "store")
    before = tree(path)
    shard = path / "k@2/000001.safetensors"
    contents = bytearray(shard.read_bytes())
    contents[-6000] ^= 1
    shard.write_bytes(contents)
    done = repair(path)
    assert done.shards == ((HookPoint("k", 2), 1),)
    with place.locked(path):
        target = session.find(path).unfinished
        assert target is not None and (target.parts[0].kept, target.parts[0].selection) == (9, RULE)
        session.resume(path, target, {})
        write_rows(path, target, [(0, 23)], truth())
        finish(path, target)
    assert tree(path) == before


def two(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> list[Path]:
    """Two stores of other documents."""
    paths = []
    for number, options in enumerate((first, second)):
        model = {"weights_sha256": "1" * 64, "architecture": {"num_layers": 4, "hidden_size": 6, "vocab_size": 1000}}
        parts, kept = (((4, 3), 2), ((5,), 3)), (1, 2, 6, 8, 11)
        given: dict[str, Any] = {"parts": parts, "kept": kept, "model": model, "seed": number, "final_norm": False}
        paths.append(craft_version_2(tmp_path / f"store-{number}", **(given | options)).path)
        for lines in paths[-1].glob("tokens/*.jsonl"):
            text = lines.read_text().replace("doc-", f"s-{number}-")
            lines.write_text(text)

        def relist(fields: dict[str, Any], path: Path = paths[-1], number: int = number) -> None:
            for part in fields["parts"]:
                contents = (path / part["documents_file"]["file"]).read_bytes()
                part["documents_file"] |= {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}

        rewrite(paths[-1], relist)
    return paths


def test_merged_stores_keep_their_rows(tmp_path: Path) -> None:
    paths = two(tmp_path, {}, {})
    merge(paths, tmp_path / "both")
    assert verify(tmp_path / "both", full=True).findings == ()
    both, alone = open_store(tmp_path / "both"), [open_store(path) for path in paths]
    assert (both.rows, both.states, both.manifest.pooling) == (24, 10, "last")
    assert both.row_of_states(slice(None)).tolist() == [1, 2, 6, 8, 11, 13, 14, 18, 20, 23]
    for point in both.hook_points:
        assert torch.equal(both[point][:], torch.cat([store[point][:] for store in alone]))
        assert both[point].state_shape == alone[0][point].state_shape
    assert both.document(4).position.tolist() == alone[1].document(1).position.tolist()
    again = tree(tmp_path / "both")
    merge(paths, tmp_path / "both")
    assert tree(tmp_path / "both") == again


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pooling": "mean"}, "store-1: pooling` must be 'last', as in"),
        ({"selection": {"every": 2}}, "store-1: parts.selection` must be {'every': 3"),
        ({"kept": None, "selection": None, "pooling": None}, "store-1: parts.kept` must be 'some rows', as in"),
        ({"shapes": {HookPoint("q", 1): (4, 3)}}, "store-1: hook_points.labels` must be"),
        ({"heads": {}}, "store-1: hook_points.labels` must be"),
    ],
)
def test_stores_that_keep_other_states_are_not_merged(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    if "shapes" in change:
        change["heads"] = {}
    first = {"heads": {}} if "shapes" in change else {}
    paths = two(tmp_path, first, change)
    with pytest.raises(UserError) as caught:
        merge(paths, tmp_path / "both")
    assert said in str(caught.value)


def put(*at: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        for key in at[:-1]:
            fields = fields[key]
        fields[at[-1]] = value

    return change


Q, WEIGHTS = ("hook_points", 1), ("hook_points", 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("parts", 0, "kept", value=24), r"parts\[0\].kept` must be at most 23, the part's rows, but is 24"),
        (put("parts", 0, "kept", value=-1), r"parts\[0\].kept` must be an integer of at least 0"),
        (put("parts", 0, "selection", value=3), r"parts\[0\].selection` must be an object"),
        (put("parts", 2, "selection", value={}), r"parts\[2\].selection` must be that of parts\[0\]"),
        (lambda fields: fields["parts"][1].pop("kept"), r"parts\[1\].selection` must stand beside `kept`"),
        (
            lambda fields: [fields["parts"][1].pop(name) for name in ("kept", "selection")],
            r"parts\[1\].kept` must be there in all parts or in none",
        ),
        (
            lambda fields: [part.pop(name) for part in fields["parts"] for name in ("kept", "selection")],
            r"parts\[0\].kept` must be there, since states are pooled",
        ),
        (put("pooling", value="median"), "pooling` must be one of last, mean, weighted_mean, but is 'median'"),
        (put(*Q, "shape", value=[]), r"hook_points\[1\].shape` must have 1 to 8 axes and 1 to 16777216 numbers"),
        (put(*Q, "shape", value=[3, 0]), r"must have 1 to 8 axes and 1 to 16777216 numbers, but is '\[3, 0\]'"),
        (put(*Q, "shape", value=[1] * 9), "must have 1 to 8 axes"),
        (put(*Q, "shape", value=[2**20, 2**20]), "must have 1 to 8 axes and 1 to 16777216 numbers"),
        (put(*Q, "shape", value=[3, "4"]), "must be a list of integers"),
        (put(*WEIGHTS, "heads", value=[0]), r"must name each head along the first axis of \[2, 5\] once"),
        (put(*WEIGHTS, "heads", value=[1, 1]), "must name each head along the first axis"),
        (put("version", value=1), "`.*` must not be in a manifest of version 1, but is 'there'"),
        (put("version", value=3), r"must be one that this release of nemo_qwen_hidden reads \(1, 2\)"),
    ],
)
def test_manifests_that_make_no_sense(tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    path = craft_version_2(tmp_path / "s").path
    rewrite(path, change)
    with pytest.raises(StoreError, match=said):
        open_store(path)


@pytest.mark.parametrize("name", ["pooling", "kept", "selection", "shape", "heads"])
def test_version_1_has_none_of_it(tmp_path: Path, name: str) -> None:
    fields = make_store(tmp_path / "s").manifest.as_dict()
    holder = {"pooling": fields, "kept": fields["parts"][0], "selection": fields["parts"][0]}.get(
        name, fields["hook_points"][0]
    )
    holder[name] = {"pooling": "last", "kept": 23, "selection": {}, "shape": [6], "heads": [1]}[name]
    with pytest.raises(StoreError, match=f"{name}` must not be in a manifest of version 1"):
        Manifest.parse(Fields(json.loads(json.dumps(fields)), file="m"), 1)


def test_each_new_thing_alone_makes_it_version_2(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "s").manifest
    assert manifest.version == 1 and json.loads(manifest.to_json())["version"] == 1
    (part,), (first, *rest) = manifest.parts, manifest.hook_points
    for changed in (
        replace(manifest, hook_points=(replace(first, shape=(2, 3)), *rest)),
        replace(manifest, parts=(replace(part, kept=23),)),
        replace(manifest, pooling="last", parts=(replace(part, kept=23),)),
    ):
        again = Manifest.from_json(changed.to_json())
        assert (again.version, again) == (2, changed)


def change_table(path: Path, kept: list[int]) -> None:
    """Puts other numbers into the first table, and everything that depends on its bytes right, but for the shards."""
    table = path / "tokens/000000.safetensors"
    contents = bytearray(table.read_bytes())
    start = 8 + int.from_bytes(contents[:8], "little")
    first, stop = json.loads(contents[8:start])["kept"]["data_offsets"]
    contents[start + first : start + stop] = np.array(kept, np.int64).tobytes()
    table.write_bytes(contents)
    digest = hashlib.sha256(contents).hexdigest()
    rewrite(path, lambda fields: fields["parts"][0]["tokens"].update(sha256=digest))


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([1, 2, 4, 9, 9, 11, 22], "kept must ascend from 0 to 22, but has 9 at 4, after 9"),
        ([2, 1, 4, 9, 10, 11, 22], "kept must ascend from 0 to 22, but has 1 at 1, after 2"),
        ([-1, 2, 4, 9, 10, 11, 22], "kept must ascend from 0 to 22, but has -1 at 0, after -1"),
        ([1, 2, 4, 9, 10, 11, 23], "kept must hold rows below 23, but ends with 23"),
        ([1, 2, 4, 9, 10, 11, 2**62], "kept must hold rows below 23"),
    ],
)
def test_kept_rows_that_cannot_be_are_found(
    tmp_path: Path, kept: list[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_qwen_hidden.store.upkeep.check_tokens._ROWS_AT_ONCE", 3)
    path = craft_version_2(tmp_path / "s").path
    assert verify(path, full=True).findings == ()
    change_table(path, kept)
    found = [finding.what for finding in verify(path, full=True).findings if finding.file.startswith("tokens/")]
    assert len(found) == 1 and found[0].startswith(said)
    if max(kept) == 2**62:
        with pytest.raises(StoreError, match="kept` must hold rows from 0 to 33"):
            open_store(path).row_of_states([6])
    if min(np.diff(kept)) <= 0:
        with pytest.raises(StoreError, match="kept` must ascend"):
            open_store(path).tokens.part(0).kept_rows(0, 23)


def test_a_table_of_other_kept_rows_is_found(tmp_path: Path) -> None:
    """Shards name the table that they belong to."""
    path = craft_version_2(tmp_path / "s").path
    change_table(path, [1, 2, 4, 9, 10, 11, 21])
    assert {finding.what.split(",")[0][:14] for finding in verify(path).findings} == {"must have part"}
    with pytest.raises(StoreError, match="must have part"):
        open_store(path)["q@1"][0]


def test_a_table_of_another_number_of_rows(tmp_path: Path) -> None:
    path = craft_version_2(tmp_path / "s", pooling=None, points=(HookPoint("embed"),)).path

    def fewer(fields: dict[str, Any]) -> None:
        fields["parts"][0]["kept"] = 6
        fields["hook_points"][0]["shards"][1]["rows"] = 1
        for shard in fields["hook_points"][0]["shards"][2:]:
            shard["first_row"] -= 1

    rewrite(path, fewer)
    with pytest.raises(StoreError, match="kept` must hold 6 rows, as the manifest says, but is 7"):
        open_store(path).row_of_states(0)
    assert any("as the manifest says" in finding.what for finding in verify(path).findings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(*Q, "shape", value=[4, 3]), "shape of q@1 must be [3, 4], but is [4, 3]"),
        (put("hook_points", 0, "shape", value=[2, 3]), "shape of embed must be [6], but is [2, 3]"),
        (put(*Q, "heads", value=[0, 1, 2]), "heads must be of attn_weights alone, but are of q@1"),
    ],
)
def test_shapes_that_are_not_the_models(tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    sizes = {"num_layers": 4, "hidden_size": 6, "vocab_size": 1000}
    heads = {"num_heads": 3, "head_dim": 4, "num_query_groups": 1, "ffn_hidden_size": 11}
    path = craft_version_2(tmp_path / "s", model={"architecture": {**sizes, **heads}}).path
    assert verify(path).findings == ()
    rewrite(path, change)
    assert [finding.what for finding in verify(path).findings] == [said]


def test_what_uses_nothing_new_has_the_bytes_of_version_1(tmp_path: Path) -> None:
    """As the first release of the format wrote them."""
    path = tmp_path / "store"
    with place.locked(path):
        with session.staging(path) as staged:
            target = draft(table(staged, None))
            session.start(path, target, {}, staged=staged)
        with ShardWriter(path, target, rank=0) as writer:
            for number, point in enumerate(target.points):
                values = torch.arange(23 * 6, dtype=torch.float32).reshape(23, 6) / 8 + number
                writer.write(point, [Run(0, 23)], values)
        finish(path, target)
    digest = hashlib.sha256()
    for name, contents in sorted(tree(path).items()):
        digest.update(name.encode() + contents)
    assert digest.hexdigest() == "95a08afa40b35400e3926915eedc9428e9d18220dccf8c1a629d59bf695c00b8"
