"""Damage of every kind: it is found by a full verification, or it changes nothing that a reader is given.

Half of it is chance, half is done by someone who knows the format and writes the manifest's digest anew.
"""

import copy
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_qwen_hidden import open_store
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.upkeep.verify import verify
from tests.store.crafted import SHAPES, craft, rewrite

POINTS = (HookPoint("embed"), HookPoint("resid_post", 3), HookPoint("final_norm"))
PARTS = (((3, 0, 7), 5), ((6, 1), 4))
ARCHITECTURE = {"num_layers": 4, "hidden_size": 6, "vocab_size": 1000, "norm_epsilon": 1e-6}
VERSION_2 = {
    "points": (*POINTS[:1], *SHAPES, *POINTS[1:]),
    "shapes": SHAPES,
    "heads": {HookPoint("attn_weights", 1): (2, 0)},
    "kept": (0, 2, 3, 4, 8, 9, 11, 15),
    "selection": {"every": 3, "spans": [[1, 2]]},
    "pooling": "last",
}
HEADS = {"num_heads": 3, "head_dim": 4, "num_query_groups": 1, "ffn_hidden_size": 11}
# what nothing else in a store contradicts; docs/format.md lists it for people
FREE = re.compile(
    r"same|model\.(path|weights_sha256|config|architecture\.vocab_size).*|tokenizer.*|producers.*|dtypes\.compute"
    r"|(without )?(model(\.architecture(\.\w+)?)?|parts\.\d+\.(shard_rows|data(\.(path|max_tokens))?))"
    r"|without parts\.\d+\.data\.\w+"
    r"|(without )?hook_points\.\d+\.shards\.\d+\.error.*"
    r"|without pooling|hook_points\.\d+\.heads.*"
    r"|without (model\.(path|weights_sha256|config)|tokenizer\.|producers\.).*"
)
Fields = Any


def fingerprint(lengths: tuple[int, ...], first_document: int, token_id: np.ndarray) -> str:
    """As the extractor makes it: of document ids and token ids."""
    digest, bounds = hashlib.sha256(), np.cumsum((0, *lengths)).tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        name = f"doc-{first_document + index}".encode()
        digest.update(len(name).to_bytes(8, "little") + name + (stop - start).to_bytes(8, "little"))
        digest.update(token_id[start:stop].astype("<i4").tobytes())
    return digest.hexdigest()


def make(path: Path, dtype: str) -> Path:
    """A store of two parts whose manifest says all that one can say; of version 2, or of a dtype."""
    second = dtype == "version 2"
    architecture = {**ARCHITECTURE, **(HEADS if second else {})}
    model = {"path": "tiny", "weights_sha256": "1" * 64, "architecture": architecture, "config": {"hidden_size": 6}}
    options: dict[str, Any] = VERSION_2 if second else {"points": POINTS}
    made = craft(path, parts=PARTS, dtype="int8" if second else dtype, model=model, **options)

    def add_data(fields: Fields) -> None:
        row = document = 0
        for part, (lengths, _) in zip(fields["parts"], PARTS, strict=True):
            digest = fingerprint(lengths, document, made.token_id[row : row + sum(lengths)])
            cut = sum(length > 5 for length in lengths)
            part["data"] = {"path": "x", "sha256": digest, "max_tokens": 5, "documents_cut_into_windows": cut}
            row, document = row + sum(lengths), document + len(lengths)
        fields["tokenizer"] = {"sha256": "2" * 64}

    rewrite(path, add_data)
    return path


def given_by(path: Path) -> list[Any]:
    """Every value and label that a reader is given."""
    store = open_store(path)
    found: list[Any] = [store.rows, store.documents, store.hidden_size, str(store.dtype), store.hook_points]
    for entry in store.manifest.hook_points:
        view, known = store[entry.point], store.statistics(entry.point)
        found += [entry.meaning, entry.norm, entry.huggingface_index, view[:].float().numpy().tobytes()]
        found += [bytes(value) if isinstance(value, np.ndarray) else value for value in vars(known).values()]
    tokens = store.tokens
    found += [np.asarray(column).tolist() for column in (tokens.token_id, tokens.document, tokens.position)]
    found += [(tokens.document_info(index), store.document(index).rows) for index in range(store.documents)]
    found += [store.row_of_states(slice(None)).tolist(), [view.state_shape for view in store.views().values()]]
    found += [store.document(index).states for index in range(store.documents)]
    weight, eps = store.final_norm
    return [*found, weight.tolist(), eps]


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16", "int8", "version 2"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "store", request.param)


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def damaged(whole: Path, tmp_path: Path, seed: int, damage: Callable[[Path, random.Random], str]) -> None:
    """Damages a copy, and asserts what this file is about."""
    path = Path(shutil.copytree(whole, tmp_path / str(seed)))
    what = damage(path, random.Random(seed))
    try:
        found = verify(path, full=True).findings
    except StoreError:
        return
    assert found or FREE.fullmatch(what), f"not found: {what}"
    if not found:
        assert given_by(path) == given_by(whole), what
    shutil.rmtree(path)


def flip(path: Path, rng: random.Random) -> str:
    file = rng.choice(files(path))
    place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1 << bit
    file.write_bytes(contents)
    return f"bit {bit} of byte {place} of {file}"


def cut_off(path: Path, rng: random.Random) -> str:
    file = rng.choice(files(path))
    size = rng.choice([0, file.stat().st_size - 1, rng.randrange(file.stat().st_size)])
    os.truncate(file, size)
    return f"{file} cut at {size}"


def extend(path: Path, rng: random.Random) -> str:
    file = rng.choice(files(path))
    added = rng.choice([b"\0", b" ", b"\n", bytes(64)])
    with open(file, "ab") as opened:
        opened.write(added)
    return f"{added!r} after {file}"


def delete(path: Path, rng: random.Random) -> str:
    file = rng.choice(files(path))
    file.unlink()
    return f"{file} deleted"


def swap(path: Path, rng: random.Random) -> str:
    """Any two files; those of one kind more often."""
    kind = rng.choice(["*/0*.safetensors", "*/0*.safetensors", "tokens/*.safetensors", "tokens/*.jsonl", "**/*.*"])
    first, second = rng.sample(sorted(path.glob(kind)), 2)
    first.rename(path / "between")
    second.rename(first)
    (path / "between").rename(second)
    return f"{first} and {second} swapped"


def add(path: Path, rng: random.Random) -> str:
    """A file that is not listed."""
    name = rng.choice(["notes.txt", "embed/000009.safetensors", "embed/x", "tokens/000007.safetensors", "resid_post@1"])
    (path / name).write_bytes(b"x")
    return f"{name} added"


ON_DISK = (flip, flip, flip, cut_off, extend, delete, swap, swap, add)


def test_what_is_whole_is_found_so(whole: Path) -> None:
    assert verify(whole).findings == verify(whole, full=True).findings == ()


@pytest.mark.parametrize("batch", range(4))
def test_damage_on_disk_is_found(whole: Path, tmp_path: Path, batch: int) -> None:
    for seed in range(20 * batch, 20 * batch + 20):
        damaged(whole, tmp_path, seed, ON_DISK[seed % len(ON_DISK)])


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a JSON value, whole objects and lists among them."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*at, key)
        yield from leaves(inner, (*at, key))


def edit(fields: Fields, rng: random.Random) -> str:
    """Changes one value of a manifest; its path."""
    path = rng.choice(list(leaves(fields)))
    if path[0] in ("sha256", "format", "version"):
        path = ("hidden_size",)
    holder = fields
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], copy.deepcopy(holder[path[-1]])
    if rng.random() < 0.2:
        del holder[key]
        return "without " + ".".join(map(str, path))
    changes: list[Callable[[], Any]] = [lambda: holder.__setitem__(key, [])]
    if isinstance(old, int):
        changes += [lambda by=by: holder.__setitem__(key, old + by) for by in (1, -1, 7, 2**40)]  # type: ignore[misc]
    elif isinstance(old, float):
        changes += [lambda by=by: holder.__setitem__(key, old * by) for by in (2, 1.001, 0)]  # type: ignore[misc]
    elif isinstance(old, str):
        others = ("before", "after", "fp32", "bf16", "fp16", "int8", "embed", "resid_post@2", "0" * 64, old + "x")
        changes += [lambda text=text: holder.__setitem__(key, text) for text in others]  # type: ignore[misc]
    elif isinstance(old, list) and len(old) > 1:
        changes += [holder[key].reverse, lambda: holder[key].append(old[0]), lambda: holder[key].pop(0)]
    elif isinstance(old, dict):
        changes += [lambda: holder.__setitem__(key, {}), lambda: holder.__setitem__(key, None)]
    elif old is None:
        changes += [lambda: holder.__setitem__(key, 0)]
    rng.choice(changes)()
    same = isinstance(holder, dict) and key in holder and holder[key] == old
    return "same" if same else ".".join(map(str, path))


def exchange(fields: Fields, rng: random.Random) -> str:
    """Puts the same field of two shards, parts or hook points in each other's place."""
    points = fields["hook_points"]
    shards = [shard for point in points for shard in point["shards"]]
    pairs = {
        "shard": (shards, list(shards[0])),
        "part": (fields["parts"], ["tokens", "documents_file", "data", "rows", "documents"]),
        "point": (points, ["name", "site", "meaning", "norm", "huggingface_index", "shards"]),
    }
    kind = rng.choice(list(pairs))
    holders, keys = pairs[kind]
    (one, two), key = rng.sample(holders, 2), rng.choice(keys)
    one[key], two[key] = two[key], one[key]
    return "same" if one[key] == two[key] or key == "error" else f"{kind} {key}"


@pytest.mark.parametrize("batch", range(4))
@pytest.mark.parametrize("knowing", [False, True], ids=["by-chance", "by-one-who-knows"])
def test_an_edited_manifest_is_found(whole: Path, tmp_path: Path, batch: int, knowing: bool) -> None:
    """Without a new digest, reading refuses it; with one, a full verification contradicts whatever can be."""

    def damage(path: Path, rng: random.Random) -> str:
        change = exchange if rng.random() < 0.2 else edit
        said = ""

        def apply(fields: Fields) -> None:
            nonlocal said
            said = change(fields, rng)

        old = json.loads((path / "manifest.json").read_text())["sha256"]
        rewrite(path, apply)
        if not knowing:
            text = (path / "manifest.json").read_text()
            new = json.loads(text)["sha256"]
            (path / "manifest.json").write_text(text.replace(new, old, 1))
            if new != old:
                with pytest.raises(StoreError, match="must be"):
                    open_store(path)
        return said

    for seed in range(1000 + 20 * batch, 1000 + 20 * batch + (20 if knowing else 5)):
        damaged(whole, tmp_path, seed, damage)
