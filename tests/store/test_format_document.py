"""docs/format.md is enough: the reader in it reads what the package writes, and it knows every field and every rule.

What is computed here follows the document, not the package.
"""

import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import LAYERLESS_SITES, SITES, HookPoint
from nemo_qwen_hidden.store import format as layout
from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.fields import Fields
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.statistics import BINS, ERROR_BITS, LIMIT, UNIT_BITS
from nemo_qwen_hidden.store.upkeep.check_shards import NORM_TOLERANCE
from nemo_qwen_hidden.store.write import session
from tests.store.crafted import PARTS, craft, craft_version_2
from tests.store.helpers import make_store, unfinished

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
TEXT = DOCUMENT.read_text()


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The reader in the document."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16", "int8"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several parts, by the tests' own means."""
    return craft(tmp_path_factory.mktemp("crafted") / "store", parts=PARTS, dtype=request.param).path


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16", "int8"])
def second(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of version 2, with everything that is new in it."""
    return craft_version_2(tmp_path_factory.mktemp("second") / "store", dtype=request.param).path


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16", "int8"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One part, by the package's."""
    return make_store(tmp_path_factory.mktemp("written") / "store", stored_dtype=request.param).path


def same(reader: dict[str, Any], path: Path) -> None:
    opened = open_store(path)
    for name in opened.hook_points:
        found = opened[name][:].float().numpy().reshape(-1, *opened[name].state_shape)
        assert np.array_equal(reader["states"](path, name), found)
    assert np.array_equal(reader["row_of_each_state"](path), opened.row_of_states(slice(None)))
    columns = reader["tokens"](path)
    for name, column in columns.items():
        assert np.array_equal(column, np.asarray(getattr(opened.tokens, name)))


def test_the_reader_reads_several_parts(reader: dict[str, Any], store: Path) -> None:
    same(reader, store)


def test_the_reader_reads_what_the_package_writes(reader: dict[str, Any], written: Path) -> None:
    same(reader, written)


def test_the_reader_reads_version_2(reader: dict[str, Any], second: Path) -> None:
    assert reader["manifest_of"](second)["version"] == 2
    same(reader, second)


def test_the_reader_refuses_damage(reader: dict[str, Any], tmp_path: Path) -> None:
    path = craft(tmp_path / "store").path
    for name in ("manifest.json", "embed/000000.safetensors"):
        contents = bytearray((path / name).read_bytes())
        contents[-2] ^= 1
        (path / name).write_bytes(contents)
        with pytest.raises((AssertionError, ValueError)):
            reader["states"](path, "embed")
        contents[-2] ^= 1
        (path / name).write_bytes(contents)
    reader["states"](path, "embed")


def keys(value: Any) -> Iterator[str]:
    """Every key of a JSON value but those of free JSON."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key
        if key not in ("model", "tokenizer", "producers", "data", "selection"):
            yield from keys(inner)
    for inner in value if isinstance(value, list) else ():
        yield from keys(inner)


def test_every_field_is_described(written: Path, store: Path, second: Path, tmp_path: Path) -> None:
    unfinished(tmp_path / "unfinished")
    texts = [(path / "manifest.json").read_text() for path in (written, store, second)]
    texts.append((tmp_path / "unfinished/unfinished.json").read_text())
    lines = [
        line for file in (tmp_path / "unfinished/journal").glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    texts += [line.partition(" ")[2] for line in lines]
    found = {key for text in texts for key in keys(json.loads(text))}
    assert {key for key in found if f"`{key}`" not in TEXT} == set()
    assert lines


def test_every_file_has_the_name_that_is_described(written: Path) -> None:
    shapes = [r"manifest\.json", r"tokens/\d{6}\.safetensors", r"tokens/\d{6}\.documents\.jsonl"]
    shapes.append(r"(embed|final_norm|resid_post@\d+)/\d{6}\.safetensors")
    names = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    assert {name for name in names if not any(re.fullmatch(shape, name) for shape in shapes)} == set()


def test_numbers_in_the_text_are_those_of_the_code() -> None:
    assert (BINS, LIMIT, UNIT_BITS, ERROR_BITS) == (5376, 2**22, 40, 50)
    assert (layout.FORMAT, layout.VERSIONS_READ) == ("nemo_qwen_hidden.store", (1, 2))
    assert set(layout.DTYPES) == {"fp32", "bf16", "fp16", "int8"}
    assert NORM_TOLERANCE == 1e-12
    for text in ("[5376]", "2^22", "2^-40", "2^-50", "1e-12", "`nemo_qwen_hidden.unfinished`"):
        assert text in TEXT


def test_meanings_are_those_of_the_text() -> None:
    for layers in (3, 28):
        for point in (HookPoint(site, None if site in LAYERLESS_SITES else 2) for site in SITES):
            entry = HookPointEntry.of(point, num_layers=layers, shards=0, shape=(6,))
            said = entry.meaning.replace(f"layer {point.layer} (", "layer I (").replace(f"of {layers})", "of L)")
            said = said.replace(f"resid_post@{layers - 1}", "resid_post@M")
            (line,) = (line for line in TEXT.splitlines() if line.startswith(f"| `{point.site}` | `["))
            assert line.endswith(f"| {said} |")
            assert (entry.norm == "after") == (point.site == "final_norm")


def shards(reader: dict[str, Any], path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], np.ndarray]]:
    """Each shard's entry, tensors and values."""
    manifest = reader["manifest_of"](path)
    for entry in manifest["hook_points"]:
        values = reader["states"](path, entry["name"]).astype(np.float64)
        for shard in entry["shards"]:
            rows = values[shard["first_row"] : shard["first_row"] + shard["rows"]]
            yield shard, reader["tensors"](path, shard), rows


def test_statistics_are_what_the_text_says(reader: dict[str, Any], written: Path) -> None:
    for shard, tensors, values in shards(reader, written):
        norms = np.sqrt((values**2).sum(axis=1))
        row, _ = divmod(int(np.abs(values).argmax()), values.shape[1])
        known = shard["statistics"]
        assert (known["rows"], known["nan"], known["inf"]) == (len(values), 0, 0)
        assert (known["max_abs"], known["max_abs_row"]) == (np.abs(values).max(), row)
        assert math.isclose(known["min_norm"], norms.min(), rel_tol=1e-12)
        assert math.isclose(known["max_norm"], norms.max(), rel_tol=1e-12)
        moments = tensors["statistics.moments"].tolist()
        for place in range(values.shape[1]):
            for line, power in ((0, 1), (2, 2)):
                exact = sum(round(Fraction(value) ** power * 2**40) for value in values[:, place].tolist())
                assert moments[line][place] * 2**40 + moments[line + 1][place] == exact
                assert 0 <= moments[line + 1][place] < 2**40
        bins = np.zeros(5376, int)
        for norm in norms.tolist():
            mantissa, exponent = math.frexp(norm)
            bins[128 * (exponent - 1 + 12) + math.floor(128 * (2 * mantissa - 1))] += 1
        assert np.array_equal(tensors["statistics.norms"], bins)


def test_headers_are_what_the_text_says(reader: dict[str, Any], written: Path) -> None:
    manifest = reader["manifest_of"](written)
    (part,) = manifest["parts"]
    for entry in manifest["hook_points"]:
        for shard in entry["shards"]:
            data = (written / shard["file"]).read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            assert start % 64 == 0
            assert header.pop("__metadata__") == {
                "hook_point": entry["name"],
                "norm": entry["norm"],
                "part": part["tokens"]["sha256"],
                "first_row": str(shard["first_row"]),
                "rows": str(shard["rows"]),
            }
            scale = ["scale"] if manifest["dtypes"]["stored"] == "int8" else []
            assert list(header) == [entry["name"], *scale, "statistics.moments", "statistics.norms"]


def test_lines_about_documents_are_what_the_text_says(reader: dict[str, Any], written: Path) -> None:
    (part,) = reader["manifest_of"](written)["parts"]
    table = reader["tensors"](written, part["tokens"])
    lines = (written / part["documents_file"]["file"]).read_bytes().split(b"\n")
    assert lines.pop() == b""
    bounds = table["document_first_row"].tolist()
    assert len(lines) == len(bounds) - 1 == part["documents"]
    for line, start, stop in zip(lines, bounds, bounds[1:], strict=False):
        fields = json.loads(line)
        assert fields["rows"] == stop - start
        assert fields["sha256"] == hashlib.sha256(table["token_id"][start:stop].astype("<i4").tobytes()).hexdigest()


def test_the_journal_is_what_the_text_says(tmp_path: Path) -> None:
    target = unfinished(tmp_path / "store", rows=(range(2, 6),))
    marker = json.loads((tmp_path / "store/unfinished.json").read_text())
    assert marker["target"]["rows"] == target.rows
    assert {shard for entry in marker["target"]["hook_points"] for shard in entry["shards"]} == {None}
    rows = []
    for file in (tmp_path / "store/journal").glob("*.jsonl"):
        assert re.fullmatch(r"\d+-[0-9a-f]+\.jsonl", file.name)
        for line in file.read_bytes().splitlines():
            crc, _, text = line.partition(b" ")
            assert int(crc, 16) == zlib.crc32(text) and len(crc) == 8
            rows += [
                (name, *pair)
                for each in json.loads(text)["rows"]
                for name in each["hook_points"]
                for pair in each["ranges"]
            ]
    assert sorted(rows) == sorted((str(point), 2, 4) for point in target.points)


def test_unknown_fields_are_kept_and_later_versions_refused(written: Path) -> None:
    manifest = Manifest.from_json((written / "manifest.json").read_bytes())
    values = manifest.as_dict()
    values["later"] = values["parts"][0]["later"] = values["hook_points"][0]["shards"][0]["later"] = {"x": 1}
    again = Manifest.parse(Fields(json.loads(json.dumps(values)), file="m"), 1)
    assert again.as_dict() == values
    text = (written / "manifest.json").read_text().replace('"version": 1', '"version": 3')
    with pytest.raises(StoreError, match="must be one that this release of nemo_qwen_hidden reads"):
        Manifest.from_json(text.encode())
    assert session.find(written).finished == manifest
