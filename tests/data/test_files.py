"""Which files a path stands for, and in which order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_qwen_hidden.data.files import list_files
from nemo_qwen_hidden.data.sources import check_path, read_documents
from nemo_qwen_hidden.errors import DataError


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def names(path: str) -> list[str]:
    return [file.name for file in list_files(path)]


def rejection(path: str) -> DataError:
    with pytest.raises(DataError) as caught:
        check_path(path)
    with pytest.raises(DataError) as again:
        list(read_documents(path))
    assert str(again.value) == str(caught.value)
    assert caught.value.setting == "data.path"
    assert caught.value.value == path
    assert "\n" not in str(caught.value)
    return caught.value


@contextmanager
def without_privileges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Works in ``folder`` as a user whom file modes bind: root may read whatever there is."""
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


def test_folder_is_recursive_sorted_by_name_and_skips_hidden(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/z.txt", "a.txt", "a/b/c.md", "a-b.txt", ".git/config", ".hidden", "a/.cache/x.txt")
    assert names(str(tmp_path)) == ["a-b.txt", "a.txt", "a/b/c.md", "a/z.txt", "b.txt"]


def test_names_do_not_depend_on_where_the_data_lies_nor_on_how_the_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "corpus/a.txt", "corpus/sub/b.txt")
    monkeypatch.chdir(tmp_path)
    for folder in ("corpus", "./corpus/", str(tmp_path / "corpus"), "corpus/sub/.."):
        assert names(folder) == ["a.txt", "sub/b.txt"]
        assert names(f"{folder}/**/*.txt") == ["a.txt", "sub/b.txt"]
    assert names("corpus/a.txt") == names(str(tmp_path / "corpus/a.txt")) == ["a.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "s/c.txt", "s/t/d.txt"]),
        ("**", ["a.txt", "b.txt", "n.md", "s/c.txt", "s/t/d.txt"]),
        ("*/*.txt", ["s/c.txt"]),
        ("s/**/d.*", ["t/d.txt"]),
        ("**/t/**/*.txt", ["s/t/d.txt"]),
        ("[ab].txt", ["a.txt", "b.txt"]),
        ("?.md", ["n.md"]),
        (".h*", [".h.txt"]),
        ("*", ["a.txt", "b.txt", "n.md"]),
    ],
)
def test_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]) -> None:
    make(tmp_path, "a.txt", "b.txt", "n.md", ".h.txt", "s/c.txt", "s/t/d.txt", ".g/e.txt")
    assert names(f"{tmp_path}/{pattern}") == expected
    monkeypatch.chdir(tmp_path)
    assert names(pattern) == expected


def test_existing_file_wins_over_the_glob_that_its_name_looks_like(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt")
    assert names(str(tmp_path / "a[1].txt")) == ["a[1].txt"]


def test_linked_files_and_folders_are_followed(tmp_path: Path) -> None:
    make(tmp_path, "far/x.txt", "far/deep/y.txt", "here/a.txt")
    (tmp_path / "here/linked").symlink_to(tmp_path / "far")
    (tmp_path / "here/b.txt").symlink_to(tmp_path / "far/x.txt")
    assert names(str(tmp_path / "here")) == ["a.txt", "b.txt", "linked/deep/y.txt", "linked/x.txt"]
    assert names(str(tmp_path / "here/**/*.txt")) == ["a.txt", "b.txt", "linked/deep/y.txt", "linked/x.txt"]


@pytest.mark.parametrize("suffix", ["", "/**/*.txt"])
def test_links_in_a_circle_are_refused(tmp_path: Path, suffix: str) -> None:
    make(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a")
    assert "link to a folder above it" in rejection(f"{tmp_path}{suffix}").rule


@pytest.mark.parametrize("path", ["nowhere", "nowhere/x.txt", "", "a\0b", "Some text, given instead of a path."])
def test_missing(path: str) -> None:
    assert rejection(path).rule == "must be a file, folder or glob that exists"


def test_glob_without_matches(tmp_path: Path) -> None:
    make(tmp_path, "sub/a.txt")
    assert rejection(f"{tmp_path}/*.md").rule == "must match at least one file"
    assert rejection(f"{tmp_path}/none/*.md").rule == "must match at least one file"
    assert "it matches folders" in rejection(f"{tmp_path}/*").rule


def test_folder_without_files(tmp_path: Path) -> None:
    make(tmp_path, ".hidden", "sub/.hidden")
    assert rejection(str(tmp_path)).rule == "must hold a file that is not hidden"


def test_what_is_neither_file_nor_folder(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "gone.txt", tmp_path / "pipe", tmp_path / "*"):
        assert "only files and folders" in rejection(str(path)).rule
    assert repr(str(tmp_path / "pipe")) in rejection(str(tmp_path / "pipe")).rule


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.txt", "z.txt", "z.jsonl")
    (tmp_path / "z.txt").chmod(0)
    (tmp_path / "z.jsonl").chmod(0)
    with without_privileges(tmp_path, monkeypatch):
        assert rejection("z.txt").rule == "must be readable ('z.txt': Permission denied)"
        assert rejection("*.jsonl").rule == "must be readable ('z.jsonl': Permission denied)"
        with pytest.raises(DataError, match=r"'z\.jsonl': Permission denied"):
            check_path(".")


@pytest.mark.parametrize("path", ["data", "data/**/*.txt", "data/shut/*.txt", "data/shut/a.txt"])
def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    make(tmp_path, "data/shut/a.txt", "data/b.txt")
    (tmp_path / "data/shut").chmod(0)
    try:
        with without_privileges(tmp_path, monkeypatch):
            assert "must be readable ('data/shut" in rejection(path).rule
    finally:
        (tmp_path / "data/shut").chmod(0o755)
