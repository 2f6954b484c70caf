"""What a verification says: which file, which rows, and why."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_qwen_hidden.data.fingerprint import DataFingerprint
from nemo_qwen_hidden.data.tokenize import TokenizedDocument
from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.header import read_header
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.store.write import place, session
from tests.store.crafted import PARTS, Crafted, craft, rewrite

SHARD = "resid_post@3/000001.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Crafted:
    return craft(tmp_path_factory.mktemp("whole") / "store", parts=PARTS)


@pytest.fixture
def store(whole: Crafted, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.path, tmp_path / "store"))


def flip(file: Path, place: int) -> None:
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1
    file.write_bytes(contents)


def test_a_whole_store(store: Path) -> None:
    done: list[tuple[int, int]] = []
    for full in (False, True):
        report = verify(store, full=full, report=lambda *bytes: done.append(bytes))
        assert (report.findings, report.unfinished, report.full) == ((), None, full)
        assert report.files == sum(file.is_file() for file in store.rglob("*"))
        assert (
            report.bytes
            == sum(file.stat().st_size for file in store.rglob("*.*")) - os.stat(store / "manifest.json").st_size
        )
        assert done[-1] == (report.bytes, report.bytes)
        assert done == sorted(done)
        done.clear()


def test_a_changed_value_is_named_with_its_rows(store: Path) -> None:
    flip(store / SHARD, 700)
    assert verify(store).findings == ()
    (found,) = verify(store, full=True).findings
    assert (found.file, str(found.hook_point), found.shard, found.rows) == (SHARD, "resid_post@3", 1, range(5, 10))
    assert found.what.startswith("must have the SHA-256 ")
    assert found.as_dict() == {
        "file": SHARD,
        "hook_point": "resid_post@3",
        "shard": 1,
        "rows": [5, 10],
        "what": found.what,
    }


FAST: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (
        lambda store: (store / SHARD).unlink(),
        SHARD,
        "must be a regular file, reached through no symbolic link, that can be read, but is 'No such file",
    ),
    "shorter": (lambda store: os.truncate(store / SHARD, 100), SHARD, "must be "),
    "other-shard": (
        lambda store: shutil.copy(store / "resid_post@3/000002.safetensors", store / SHARD),
        SHARD,
        "must have first_row '5', as the manifest says, but has '10'",
    ),
    "other-hook-point": (
        lambda store: shutil.copy(store / "resid_post@0/000001.safetensors", store / SHARD),
        SHARD,
        "must hold resid_post@3 F32 [5, 6], statistics",
    ),
    "link": (
        lambda store: ((store / SHARD).rename(store / "x"), (store / SHARD).symlink_to(store / "x")),
        SHARD,
        "must be a regular file, reached through no symbolic link",
    ),
    "foreign": (
        lambda store: (store / "a.txt").touch(),
        "a.txt",
        "must be a part of the store, which has no such file",
    ),
    "foreign-folder": (
        lambda store: (store / "a").mkdir(),
        "a",
        "must be a part of the store, which has no such folder",
    ),
    "foreign-link": (
        lambda store: (store / "embed/x").symlink_to("/etc"),
        "embed/x",
        "must be a part of the store, which has no such symbolic link",
    ),
    "unlisted": (
        lambda store: (store / "embed/000020.safetensors").touch(),
        "embed/000020.safetensors",
        "must be a part of the store, which has no such file",
    ),
    "pipe": (
        lambda store: os.mkfifo(store / "tokens/x.tmp"),
        "tokens/x.tmp",
        "must be a part of the store, which has no such device, pipe or socket",
    ),
    "marker": (
        lambda store: (store / "unfinished.json").write_text("{}"),
        "unfinished.json",
        "must say what an unfinished job is making",
    ),
    "token-table": (
        lambda store: os.truncate(store / "tokens/000002.safetensors", 60),
        "tokens/000002.safetensors",
        "must be ",
    ),
}


@pytest.mark.parametrize(("damage", "file", "what"), FAST.values(), ids=FAST)
def test_what_names_sizes_and_headers_show(store: Path, damage: Callable[[Path], object], file: str, what: str) -> None:
    damage(store)
    found = {finding.file: finding.what for finding in verify(store).findings}
    assert found[file].startswith(what)


def rehash(store: Path, file: str) -> None:
    """Lists a changed file with its new size and SHA-256, as whoever means harm would."""
    contents = (store / file).read_bytes()

    def change(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("file") == file:
                value |= {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
            for inner in value.values():
                change(inner)
        elif isinstance(value, list):
            for inner in value:
                change(inner)

    rewrite(store, change)


def poke(file: Path, tensor: str, index: int, value: float, dtype: str) -> None:
    """Sets one number of a safetensors file."""
    with open(file, "r+b") as opened:
        offset = read_header(opened.fileno(), str(file)).offsets[tensor]
        opened.seek(offset + index * np.dtype(dtype).itemsize)
        opened.write(np.array(value, dtype).tobytes())


TABLE, LINES, NORM = "tokens/000000.safetensors", "tokens/000000.documents.jsonl", "final_norm.safetensors"
POKED: dict[str, tuple[str, str, int, float, str, str]] = {
    "value": (SHARD, "resid_post@3", 3, 1e4, "<f4", "statistics.max_abs must be 10000.0, as its values say, but is "),
    "nan": (SHARD, "resid_post@3", 3, np.nan, "<f4", "statistics.rows must be 4, as its values say, but is 5"),
    "infinite": (SHARD, "resid_post@3", 3, np.inf, "<f4", "statistics.rows must be 4, as its values say, but is 5"),
    "moments": (SHARD, "statistics.moments", 7, 3, "<i8", "statistics.moments must be what its values give"),
    "norms": (SHARD, "statistics.norms", 7, 3, "<i4", "statistics.norms must be what its values give"),
    "negative-norms": (SHARD, "statistics.norms", 7, -1, "<i4", "statistics.norms must be what its values give"),
    "document": (TABLE, "document", 4, 1, "<i4", "document of row 4 must be 2, as document_first_row says, but is 1"),
    "position": (TABLE, "position", 4, 9, "<i4", "position of row 4 must be 1, as document_first_row says, but is 9"),
    "token": (TABLE, "token_id", 4, -1, "<i4", "token_id must be from 0 to 2147483647, but is from -1 to "),
    "first-row": (TABLE, "document_first_row", 1, 30, "<i8", "document_first_row must ascend from 0 to 23"),
    "first-first-row": (TABLE, "document_first_row", 0, 1, "<i8", "document_first_row must ascend from 0 to 23"),
    "last-first-row": (TABLE, "document_first_row", 5, 22, "<i8", "document_first_row must end at 23, but ends at 22"),
    "weight": (NORM, "weight", 1, np.nan, "<f4", "weight must be finite"),
}


@pytest.mark.parametrize(("file", "tensor", "index", "value", "dtype", "what"), POKED.values(), ids=POKED)
def test_what_the_numbers_contradict(
    store: Path, file: str, tensor: str, index: int, value: float, dtype: str, what: str
) -> None:
    """Though every SHA-256 is right."""
    poke(store / file, tensor, index, value, dtype)
    rehash(store, file)
    found = [finding.what for finding in verify(store, full=True).findings if finding.file == file]
    assert [text for text in found if text.startswith(what)], found


@pytest.mark.parametrize("documents", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 4])
def test_long_tables_are_read_some_at_a_time(
    store: Path, documents: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_qwen_hidden.store.upkeep.check_tokens._DOCUMENTS_AT_ONCE", documents)
    monkeypatch.setattr("nemo_qwen_hidden.store.upkeep.check_tokens._ROWS_AT_ONCE", rows)
    monkeypatch.setattr("nemo_qwen_hidden.store.upkeep.check_tokens.BLOCK_BYTES", 4 * rows)
    monkeypatch.setattr("nemo_qwen_hidden.store.upkeep.check_shards.BLOCK_BYTES", 4 * 6 * rows)
    assert verify(store, full=True).findings == ()
    poke(store / TABLE, "position", 22, 7, "<i4")
    rehash(store, TABLE)
    found = [finding.what for finding in verify(store, full=True).findings if finding.file == TABLE]
    assert found == ["position of row 22 must be 11, as document_first_row says, but is 7"]


def test_what_a_job_takes_away_meanwhile_is_no_fault(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "journal").mkdir()
    scandir = os.scandir

    def racing(path: Any) -> Any:
        if Path(path).name == "journal":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", racing)
    assert verify(store).findings == ()


EDITED: dict[str, tuple[str, str, str]] = {
    "rows": ('"rows": 7', '"rows": 6', "line 3 must say of 7 rows, as document_first_row does, but says of 6"),
    "id": ('"id"', '"name"', "line 1: id must be there, but is 'missing'"),
    "no-source": ('"source"', '"origin"', "line 1: source must be there, but is 'missing'"),
    "sha256": ('"sha256": "', '"sha256": "f', "line 1 must have the sha256 of its document's tokens"),
    "more": ('"id": "doc-4"', '"id":\n"doc-4"', "line 5 must hold JSON"),
    "not-json": ("{", "", "line 1 must hold JSON"),
}


@pytest.mark.parametrize(("old", "new", "what"), EDITED.values(), ids=EDITED)
def test_what_the_lines_about_documents_contradict(store: Path, old: str, new: str, what: str) -> None:
    text = (store / LINES).read_text()
    (store / LINES).write_text(text.replace(old, new, 1))
    rehash(store, LINES)
    assert [finding.what[: len(what)] for finding in verify(store, full=True).findings] == [what]


def test_a_line_too_many(store: Path) -> None:
    with open(store / LINES, "a") as file:
        file.write("{}\n")
    rehash(store, LINES)
    assert [finding.what for finding in verify(store, full=True).findings] == ["must hold 5 lines, one a document"]


@pytest.mark.parametrize(
    ("tensor", "value", "dtype", "what"),
    [
        ("scale", np.nan, "<f4", "scale must be finite and at least 0 in every row"),
        ("scale", -1, "<f4", "scale must be finite and at least 0 in every row"),
        ("scale", np.inf, "<f4", "scale must be finite and at least 0 in every row"),
        ("embed", -128, "i1", "must hold numbers from -127 to 127"),
    ],
)
def test_int8_out_of_range(tmp_path: Path, tensor: str, value: float, dtype: str, what: str) -> None:
    store = craft(tmp_path / "store", dtype="int8").path
    poke(store / "embed/000000.safetensors", tensor, 0, value, dtype)
    rehash(store, "embed/000000.safetensors")
    assert what in [finding.what for finding in verify(store, full=True).findings]


LABELS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "meaning": (
        lambda fields: fields["hook_points"][1].update(meaning="the embeddings"),
        "meaning of resid_post@0 must be 'residual stream after decoder layer 0 (0-based, of 4); before the final "
        "norm', but is 'the embeddings'",
    ),
    "index": (
        lambda fields: fields["hook_points"][1].update(huggingface_index=0),
        "huggingface_index of resid_post@0 must be 1, but is 0",
    ),
    "layers": (lambda fields: fields["model"]["architecture"].update(num_layers=3), "resid_post@3 must be at one of "),
    "hidden-size": (
        lambda fields: fields["model"]["architecture"].update(hidden_size=7),
        "hidden_size must be 7, the model's, but is 6",
    ),
    "order": (lambda fields: fields["hook_points"].reverse(), "hook_points must be in order of depth, but are "),
}


@pytest.mark.parametrize(("change", "what"), LABELS.values(), ids=LABELS)
def test_labels_that_contradict_each_other(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    architecture = {"num_layers": 4, "hidden_size": 6, "vocab_size": 1000, "norm_epsilon": 1e-6}
    store = craft(tmp_path / "store", model={"architecture": architecture}).path
    assert verify(store, full=True).findings == ()
    rewrite(store, change)
    found = [finding.what for finding in verify(store).findings if finding.file == "manifest.json"]
    assert [text for text in found if text.startswith(what)], found


def test_a_token_outside_of_the_vocabulary_and_another_epsilon(tmp_path: Path) -> None:
    architecture = {"num_layers": 4, "hidden_size": 6, "vocab_size": 10, "norm_epsilon": 1e-5}
    store = craft(tmp_path / "store", model={"architecture": architecture}).path
    table, norm = TABLE, NORM
    found = {finding.file: finding.what for finding in verify(store, full=True).findings}
    assert found[table].startswith("token_id must be from 0 to 9, but is from ")
    assert found[norm] == "eps must be 1e-05, the model's, but is '1e-06'"


def test_another_processor_may_round_norms_otherwise(store: Path) -> None:
    """By the last bit, where the sum of squares is added up in another order."""

    def nudge(fields: dict[str, Any]) -> None:
        known = fields["hook_points"][2]["shards"][1]["statistics"]
        known["max_norm"] = float(np.nextafter(known["max_norm"], 0))

    rewrite(store, nudge)
    assert verify(store, full=True).findings == ()


def test_a_norm_on_the_bound_between_two_bins(tmp_path: Path) -> None:
    """May be counted in either; no other may be moved."""

    def values(rows: int, hidden_size: int) -> Any:
        table = np.zeros((rows, hidden_size))
        table[:, 0] = 2.0
        return table

    store = craft(tmp_path / "store", values=values).path
    norms = "statistics.norms"
    bin_of_2 = (1 + 12) * 128
    for bins, right in (((bin_of_2, bin_of_2 - 1), True), ((bin_of_2, bin_of_2 + 1), False)):
        file = f"embed/00000{int(right)}.safetensors"
        for index, value in zip(bins, (4, 1), strict=True):
            poke(store / file, norms, index, value, "<i4")
        rehash(store, file)
        found = [finding.file for finding in verify(store, full=True).findings]
        assert (file not in found) == right


def test_what_an_unfinished_job_is_making(store: Path) -> None:
    with place.locked(store):
        found = session.find(store).finished
        assert found is not None
        point = HookPoint("resid_post", 2)
        more = HookPointEntry.of(point, num_layers=4, shards=found.grid.shards, shape=(found.hidden_size,))
        entries = (*found.hook_points[:2], more, *found.hook_points[2:])
        session.start(store, replace(found, hook_points=entries), {}, fresh=False)
        (store / "resid_post@2").mkdir()
        (store / "resid_post@2/000003.safetensors.partial").touch()
        (store / "resid_post@2/000004.safetensors").touch()
        (store / "resid_post@2/000099.safetensors").touch()
        report = verify(store)
    assert [finding.file for finding in report.findings] == ["resid_post@2/000099.safetensors"]
    assert report.unfinished is not None
    shards = found.grid.shards
    assert report.unfinished.endswith(
        f": a store of 34 rows at 5 hook points, of which {shards} shards were to be made"
    )


def test_there_is_no_finished_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="must be the folder of a finished store, with a manifest"):
        verify(tmp_path / "none")
    (tmp_path / "unfinished.json").write_text('{"format": "nemo_qwen_hidden.unfinished", "pid": 3, "host": "h"}')
    with pytest.raises(StoreNotFoundError, match=r"is still being made, or was left unfinished .*by process 3 on h"):
        verify(tmp_path)


def test_a_damaged_manifest(store: Path) -> None:
    flip(store / "manifest.json", 2000)
    with pytest.raises(StoreError, match="manifest"):
        verify(store, full=True)


def test_a_fault_of_ours_is_no_finding(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("nemo_qwen_hidden.store.upkeep.check_shards.Accumulator", broken)
    with pytest.raises(RuntimeError, match="ours"):
        verify(store, full=True)


def shard_of(fields: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of ``SHARD``."""
    found: dict[str, Any] = fields["hook_points"][2]["shards"][1]
    return found


LOSSLESS = "must say of no error, since fp32 holds every value"
LISTED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "error-of-fp32": (
        "fp32",
        lambda shard: shard.update(error={"rows": 5, "squares_2e-50": 0, "max": 0}),
        LOSSLESS,
    ),
    "error-of-some-rows": (
        "bf16",
        lambda shard: shard["error"].update(rows=4),
        "must say of the error of all 5 rows, but says that of 4",
    ),
    "error-above-its-maximum": (
        "bf16",
        lambda shard: shard["error"].update({"squares_2e-50": 2**50}),
        "must have an error of at most 0.001 in the mean, as its largest is, but has 0.447",
    ),
}


@pytest.mark.parametrize(("dtype", "change", "what"), LISTED.values(), ids=LISTED)
def test_what_storing_cannot_have_cost(
    tmp_path: Path, dtype: str, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    store = craft(tmp_path / "store", dtype=dtype).path
    rewrite(store, lambda fields: change(shard_of(fields)))
    (found,) = verify(store).findings
    assert (found.file, found.what[: len(what)]) == (SHARD, what)


def test_files_of_other_names(store: Path) -> None:
    """Though the manifest lists them so."""
    names = {SHARD: "resid_post@3/000100.safetensors", NORM: "norm", TABLE: "tokens/9.safetensors", LINES: "lines"}
    for old, new in names.items():
        (store / old).rename(store / new)

    def rename(value: Any) -> None:
        if isinstance(value, dict):
            value["file"] = names.get(value.get("file"), value.get("file"))
            if value["file"] is None:
                del value["file"]
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            rename(inner)

    rewrite(store, rename)
    found = {finding.file: finding.what for finding in verify(store).findings}
    assert found == {
        "resid_post@3/000100.safetensors": f"must be named {SHARD}",
        "manifest.json": "final_norm.file must be final_norm.safetensors, but is 'norm'",
        "tokens/9.safetensors": f"must be named {TABLE}",
        "lines": f"must be named {LINES}",
    }


def test_values_that_begin_at_an_odd_place(store: Path) -> None:
    contents = (store / SHARD).read_bytes()
    size = int.from_bytes(contents[:8], "little")
    (store / SHARD).write_bytes(
        (size + 4).to_bytes(8, "little") + contents[8 : 8 + size] + b"    " + contents[8 + size :]
    )
    rehash(store, SHARD)
    (found,) = verify(store).findings
    assert found.what.startswith("must have its values at a multiple of 64 bytes, but has them at ")


def test_tables_and_norms_of_another_size(store: Path) -> None:
    norm = (store / NORM).read_bytes()
    (store / NORM).write_bytes(norm.replace(b'"weight"', b'"height"'))
    table = (store / TABLE).read_bytes()
    (store / TABLE).write_bytes(table.replace(b'"position"', b'"opsition"'))
    found = {finding.file: finding.what for finding in verify(store).findings}
    assert found[NORM] == "must hold weight F32 [6], as the manifest says, but holds height F32 [6]"
    assert found[TABLE].startswith(
        "must hold document_first_row I64 [6], token_id I32 [23], document I32 [23], position "
    )
    assert "opsition" in found[TABLE]


def test_an_epsilon_that_is_no_number(store: Path) -> None:
    norm = (store / NORM).read_bytes()
    (store / NORM).write_bytes(norm.replace(b'"1e-06"', b'"small"'))
    assert [finding.what for finding in verify(store).findings] == ["eps must be a number from 0 to 1, but is 'small'"]


def test_a_line_that_does_not_end(store: Path) -> None:
    contents = (store / LINES).read_bytes()
    (store / LINES).write_bytes(contents[:-1])
    rehash(store, LINES)
    (found,) = verify(store, full=True).findings
    assert found.what.startswith("line 5 must be a whole line of at most 16777216 bytes, but is ")


def test_the_data_are_those_that_the_extractor_read(store: Path, whole: Crafted) -> None:
    fingerprint = DataFingerprint()
    for index, length in enumerate(PARTS[0][0]):
        start = sum(PARTS[0][0][:index])
        ids = whole.token_id[start : start + length]
        fingerprint.update(TokenizedDocument(id=f"doc-{index}", source="any", token_ids=ids))
    data = {"sha256": fingerprint.hexdigest(), "max_tokens": 5, "documents_cut_into_windows": 2}
    rewrite(store, lambda fields: fields["parts"][0].update(data=data))
    assert verify(store, full=True).findings == ()
    data |= {"sha256": "0" * 64, "documents_cut_into_windows": 3}
    rewrite(store, lambda fields: fields["parts"][0].update(data=data))
    assert [finding.what for finding in verify(store, full=True).findings] == [
        f"data.sha256 must be {fingerprint.hexdigest()}, as its documents say, but is '{'0' * 64}' in the manifest",
        "data.documents_cut_into_windows must be 2, as its documents say, but is 3 in the manifest",
    ]


def test_a_file_that_becomes_shorter_while_it_is_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def shrinking(descriptor: int, *arguments: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(SHARD):
            os.truncate(store / SHARD, 100)
        return preadv(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", shrinking)
    (found,) = verify(store, full=True).findings
    assert (found.file, found.what[:10]) == (SHARD, "must stay ")


def test_a_marker_that_makes_no_sense(store: Path) -> None:
    (store / "unfinished.json").write_text('{"format": "nemo_qwen_hidden.unfinished", "version": 7}')
    (found,) = verify(store).findings
    assert (found.file, found.what[:20]) == ("unfinished.json", "version must be 1 or")
