"""What went in comes out, by any index that numpy takes; what is not right is refused by name."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.read.reader import UnknownHookPointError, open_store
from tests.store.crafted import LENGTHS, PARTS, POINTS, Crafted, craft, rewrite
from tests.store.helpers import Made, begin

POINT, ROWS = POINTS[2], sum(LENGTHS)


@pytest.fixture
def crafted(tmp_path: Path) -> Crafted:
    return craft(tmp_path / "store")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Crafted:
    """A store that no test changes."""
    return craft(tmp_path_factory.mktemp("fixed") / "store")


def test_what_a_store_is(fixed: Crafted) -> None:
    store = open_store(str(fixed.path))
    assert store.hook_points == ("embed", "resid_post@0", "resid_post@3", "final_norm")
    assert (store.rows, store.documents, store.hidden_size, store.dtype) == (ROWS, 5, 6, torch.float32)
    assert store.path == fixed.path and store.manifest == fixed.manifest
    assert "resid_post@3" in store and POINT in store and "resid_post@1" not in store
    assert np.array_equal(np.asarray(store.tokens.token_id), fixed.token_id)
    view = store["resid_post@3"]
    assert (view.shape, view.dtype, len(view), view.norm) == ((ROWS, 6), torch.float32, ROWS, "before")
    assert store["final_norm"].norm == "after"


def test_what_the_writer_makes_is_read(shared: Made) -> None:
    store = open_store(shared.path)
    for point, values in shared.states.items():
        assert torch.equal(store[point][:], values)
    assert np.array_equal(np.asarray(store.tokens.token_id), shared.token_ids)
    assert store.document(4).id == "doc-4"


def test_reprs_are_one_line(fixed: Crafted, tmp_path: Path) -> None:
    store = open_store(fixed.path)
    assert repr(store) == f"Store('{fixed.path}': 4 hook points x 23 rows x 6, fp32, 5 documents)"
    assert repr(store["final_norm"]) == "HookPointView(final_norm: 23 rows x 6, fp32, after the final norm)"
    assert repr(store.document(2)) == "StoredDocument(2: 'doc-2', rows 3 to 9, from 'file 2.txt')"
    assert repr(store.document(1)) == "StoredDocument(1: 'doc-1', no rows, from 'file 1.txt')"
    one = craft(tmp_path / "s", points=POINTS[:1]).path
    assert repr(open_store(one)) == f"Store('{one}': embed x 23 rows x 6, fp32, 5 documents)"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
def test_every_hook_point_comes_back_in_its_dtype(tmp_path: Path, dtype: str) -> None:
    crafted = craft(tmp_path / "store", parts=PARTS, dtype=dtype)
    store = open_store(crafted.path)
    for point, values in crafted.states.items():
        assert store[point][:].dtype == store[point].dtype == store.dtype == values.dtype
        assert torch.equal(store[point][:], values)
        assert torch.equal(store[str(point)][torch.tensor([30, 0, 30, 24])], values[[30, 0, 30, 24]])


def test_several_hook_points_at_once(fixed: Crafted) -> None:
    store = open_store(fixed.path)
    everything = store.read([4, 22, 4])
    assert list(everything) == list(store.hook_points)
    assert all(torch.equal(everything[str(point)], values[[4, 22, 4]]) for point, values in fixed.states.items())
    two = store.read(slice(2, 9), [POINT, store["embed"].to(torch.float64)])
    assert list(two) == ["resid_post@3", "embed"] and two["embed"].dtype == torch.float64
    assert torch.equal(two["resid_post@3"], fixed.states[POINT][2:9])
    assert torch.equal(store.read(7, ["embed"])["embed"], fixed.states[POINTS[0]][7])
    assert store.read([], ["embed"])["embed"].shape == (0, 6) and store.read([1], []) == {}
    with pytest.raises(UnknownHookPointError):
        store.read([1], ["resid_post@1"])
    with pytest.raises(ValueError, match="each hook point can be read once"):
        store.read([1], ["embed", store["embed"]])
    with pytest.raises(ValueError, match="a view of another store"):
        store.read([1], [open_store(fixed.path)["embed"]])
    with pytest.raises(IndexError, match="row 23 is not one of 23"):
        store.read([23])


def test_iteration_ends(fixed: Crafted) -> None:
    assert torch.equal(torch.stack(list(open_store(fixed.path)[POINT])), fixed.states[POINT])


def test_documents_of_all_parts(tmp_path: Path) -> None:
    crafted = craft(tmp_path / "store", parts=PARTS)
    store = open_store(crafted.path)
    document = store.document(2)
    assert (document.index, document.id, document.source, document.rows) == (2, "doc-2", "file 2.txt", range(3, 10))
    assert len(document) == 7 and document.token_id.tolist() == crafted.token_id[3:10].tolist()
    assert torch.equal(document["resid_post@3"], crafted.states[POINT][3:10])
    assert store.document(1)[POINT].shape == (0, 6)
    last = store.document(7)
    assert (last.id, last.rows) == ("doc-7", range(27, 33)) and torch.equal(last[POINT], crafted.states[POINT][27:33])
    with pytest.raises(IndexError, match="document 9 is not one of 9"):
        store.document(9)


def test_a_store_can_be_pickled(fixed: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fixed.path.parent)
    store = open_store("store")
    store[POINT][0]
    data = pickle.dumps((store, store[POINT].float()))
    monkeypatch.chdir("/")
    again, view = pickle.loads(data)
    assert again.path == fixed.path and torch.equal(view[:], fixed.states[POINT])


def test_a_hook_point_that_is_not_there(fixed: Crafted, tmp_path: Path) -> None:
    assert issubclass(UnknownHookPointError, KeyError) and issubclass(UnknownHookPointError, StoreError)
    with pytest.raises(UnknownHookPointError) as caught:
        open_store(fixed.path)["resid_post@1"]
    assert str(caught.value) == (
        f"`hook point` must be one that {fixed.path} holds (embed, resid_post@0, resid_post@3, final_norm), "
        "but is 'resid_post@1' instead."
    )
    points = [HookPoint("resid_post", layer) for layer in range(24)]
    store = open_store(craft(tmp_path / "s", points=points).path)
    short = (
        r"\(resid_post@0, resid_post@1, resid_post@2, resid_post@3, ..., resid_post@21, resid_post@22, resid_post@23\)"
    )
    with pytest.raises(UnknownHookPointError, match=short):
        store.document(0)["embed"]


def test_an_empty_store_can_be_read(tmp_path: Path) -> None:
    store = open_store(craft(tmp_path / "s", parts=(((0,), 5),)).path)
    assert store["embed"][:].shape == (0, 6) and store["embed"][[]].shape == (0, 6)
    assert list(store["embed"]) == [] and store.document(0)["embed"].shape == (0, 6)
    assert store["embed"].statistics().rows == 0
    assert open_store(craft(tmp_path / "t", parts=()).path).read([])["embed"].shape == (0, 6)


def test_there_is_no_store(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            open_store(path)
        assert isinstance(caught.value, StoreNotFoundError)
        assert (
            str(caught.value)
            == f"`store` must be the folder of a store, with a manifest.json, but is '{path}' instead."
        )


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    begin(tmp_path / "s")
    said = rf"must be a finished store; .* left unfinished.* \(begun .* by process {os.getpid()} on .*\), but is '.*/s'"
    with pytest.raises(StoreNotFoundError, match=said):
        open_store(tmp_path / "s")


def test_a_store_that_is_being_added_to_is_what_its_manifest_says(crafted: Crafted) -> None:
    (crafted.path / "unfinished.json").write_text('{"format": "nemo_qwen_hidden.unfinished"}')
    (crafted.path / "embed/000005.safetensors.partial").write_bytes(b"half")
    assert torch.equal(open_store(crafted.path)[POINT][:], crafted.states[POINT])


def test_opening_reads_the_manifest_alone(crafted: Crafted) -> None:
    for path in crafted.path.rglob("*.*"):
        if path.name != "manifest.json":
            path.unlink()
    store = open_store(crafted.path)
    assert store.rows == 23 and store["embed"].error() is None


def test_shards_are_opened_when_asked_for(crafted: Crafted) -> None:
    for path in crafted.path.glob("*/00000[13].safetensors"):
        path.unlink()
    store = open_store(crafted.path)
    assert torch.equal(store[POINT][[0, 10, 22]], crafted.states[POINT][[0, 10, 22]])
    with pytest.raises(StoreError) as caught:
        store[POINT][5]
    missing = crafted.path / "resid_post@3/000001.safetensors"
    assert str(caught.value) == (
        f"`{missing}` must be a regular file, reached through no symbolic link, that can be read, "
        "but is 'No such file or directory' instead."
    )
    assert torch.equal(store[POINT][10:15], crafted.states[POINT][10:15])


def spoil_swap(folder: Path) -> None:
    first, second = folder / "resid_post@3/000000.safetensors", folder / "resid_post@3/000001.safetensors"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def spoil_point(folder: Path) -> None:
    (folder / "resid_post@3/000000.safetensors").write_bytes((folder / "resid_post@0/000000.safetensors").read_bytes())


def spoil_size(folder: Path) -> None:
    os.truncate(folder / "resid_post@3/000000.safetensors", 200)


def spoil_short(folder: Path) -> None:
    path = folder / "resid_post@3/000000.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def spoil_norm(folder: Path) -> None:
    path = folder / "resid_post@3/000000.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"before"', b'"after" '))


def spoil_manifest(folder: Path) -> None:
    rewrite(folder, lambda fields: fields["dtypes"].update(stored="bf16"))


def spoil_hidden(folder: Path) -> None:
    rewrite(folder, lambda fields: fields.update(hidden_size=3))


def spoil_bytes(folder: Path) -> None:
    rewrite(folder, lambda fields: fields["hook_points"][2]["shards"][0].update(bytes=6))


def spoil_part(folder: Path) -> None:
    """Shards of a store of other documents."""
    other = craft(folder.parent / "other", seed=1)
    (folder / "resid_post@3/000000.safetensors").write_bytes(
        (other.path / "resid_post@3/000000.safetensors").read_bytes()
    )


def spoil_pickle(folder: Path) -> None:
    (folder / "resid_post@3/000000.safetensors").write_bytes(pickle.dumps({"resid_post@3": list(range(99))}))


def spoil_pipe(folder: Path) -> None:
    (folder / "resid_post@3/000000.safetensors").unlink()
    os.mkfifo(folder / "resid_post@3/000000.safetensors")


def spoil_link(folder: Path) -> None:
    path = folder / "resid_post@3/000000.safetensors"
    path.rename(folder.parent / "outside.safetensors")
    path.symlink_to(folder.parent / "outside.safetensors")


def spoil_folder_link(folder: Path) -> None:
    (folder / "resid_post@3").rename(folder.parent / "outside")
    (folder / "resid_post@3").symlink_to(folder.parent / "outside")


def spoil_loop(folder: Path) -> None:
    path = folder / "resid_post@3/000000.safetensors"
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_swap, "must have first_row 0, as the manifest says, but is '5'"),
        (spoil_point, r"must have tensors \{'resid_post@3': .*but is \{'resid_post@0': "),
        (spoil_size, "must start with the length of a safetensors header that fits into the file"),
        (spoil_short, "must be .* bytes long, as its header says, but is "),
        (spoil_part, "must have part [0-9a-f]{64}, as the manifest says, but is '[0-9a-f]{64}'"),
        (spoil_pickle, "must start with the length of a safetensors header that fits into the file"),
        (spoil_norm, "must have norm before, as the manifest says, but is 'after'"),
        (spoil_manifest, r"must have tensors .*BF16.* but is .*F32"),
        (spoil_hidden, r"must have tensors .*\(5, 3\).* but is .*\(5, 6\)"),
        (spoil_bytes, "must have bytes .*, as the manifest says, but is "),
        (spoil_pipe, "must be a regular file, .* but is 'prw"),
        (spoil_link, "reached through no symbolic link, that can be read, but is 'Too many levels of symbolic links'"),
        (spoil_folder_link, "reached through no symbolic link, that can be read, but is 'Too many levels of symbolic"),
        (spoil_loop, "reached through no symbolic link"),
    ],
)
def test_a_shard_that_is_not_what_the_manifest_says(crafted: Crafted, spoil: Any, message: str) -> None:
    spoil(crafted.path)
    store = open_store(crafted.path)
    with pytest.raises(StoreError, match=message) as caught:
        store[POINT][0]
    assert "resid_post@3/000000.safetensors" in str(caught.value)


def test_the_store_itself_may_be_a_link(crafted: Crafted) -> None:
    (crafted.path.parent / "link").symlink_to(crafted.path)
    assert torch.equal(open_store(crafted.path.parent / "link")[POINT][:], crafted.states[POINT])


@pytest.mark.parametrize("name", ["manifest.json", "tokens/000000.safetensors", "tokens/000000.documents.jsonl"])
def test_no_file_is_read_outside_the_store(crafted: Crafted, name: str) -> None:
    (crafted.path / name).rename(crafted.path.parent / "outside")
    (crafted.path / name).symlink_to(crafted.path.parent / "outside")
    with pytest.raises(StoreError, match=f"{name}` must be a regular file, reached through no symbolic link"):
        open_store(crafted.path).document(0)


def test_claims_without_end(crafted: Crafted) -> None:
    rewrite(crafted.path, lambda fields: fields.update(hidden_size=2**62))
    with pytest.raises(StoreError, match=r"manifest.json: hidden_size` must be at most \d+"):
        open_store(crafted.path)


def test_a_row_that_no_shard_could_hold(crafted: Crafted) -> None:
    rewrite(crafted.path, lambda fields: fields.update(hidden_size=2**24))
    with pytest.raises(StoreError, match=r"must have shards that hold states of 16777216 values"):
        open_store(crafted.path)[POINT][0]


def test_shards_that_claim_more_than_there_are_addresses(crafted: Crafted) -> None:
    for size in (2**50, 2**60):
        rewrite(crafted.path, lambda fields, size=size: fields["hook_points"][2]["shards"][0].update(bytes=size))
        with pytest.raises(StoreError, match=r"must have bytes|must have shards that can be mapped into memory"):
            open_store(crafted.path)[POINT][0]


def test_a_final_norm_that_is_not_one(crafted: Crafted) -> None:
    path = crafted.path / "final_norm.safetensors"
    good = path.read_bytes()
    for bad, message in (
        (
            good.replace(b'"1e-06"', b'"a lot"'),
            "final_norm.safetensors: eps` must be a number from 0 to 1, but is 'a l",
        ),
        (
            good.replace(b'"1e-06"', b'"nan"  '),
            "final_norm.safetensors: eps` must be a number from 0 to 1, but is 'nan'",
        ),
        (good.replace(b"weight", b"height"), "final_norm.safetensors` must be .* bytes that hold"),
        (good[:-1], "as its header says"),
    ):
        path.write_bytes(bad)
        with pytest.raises(StoreError, match=message):
            _ = open_store(crafted.path).final_norm
    with pytest.raises(StoreError, match="`final_norm` must be known to the store"):
        _ = open_store(craft(crafted.path.parent / "t", final_norm=False).path).final_norm


def test_unknown_version(crafted: Crafted) -> None:
    rewrite(crafted.path, lambda fields: fields.update(version=9))
    with pytest.raises(
        StoreError, match=re.escape("that this release of nemo_qwen_hidden reads (1, 2), but is 9 instead")
    ):
        open_store(crafted.path)
