"""``drift``: what it prints and writes, and what it refuses in one line."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_qwen_hidden.cli.main import main
from tests.drift.helpers import LENGTHS, make_steps, random_steps
from tests.store.helpers import make_store


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_steps(tmp_path_factory.mktemp("drift") / "store", random_steps()).path)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    records = [{"id": f"doc-{number}", "kind": "ab"[number % 2]} for number in range(len(LENGTHS))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that was said, with status 2 and nothing on stdout."""
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("nemo-qwen-hidden: ")
    return err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["drift", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "  nemo-qwen-hidden drift out/probes" in out
    assert max(map(len, out.splitlines())) <= 80


def test_tables_are_as_wide_as_a_terminal(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", str(store)]) == 0
    out, err = capfd.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80
    assert "mean cosine to step 0" in out and "accuracy of a linear probe" in out and "before: no, yes" in out
    assert sorted(path.name for path in store.parent.iterdir()) == ["store"]


def test_pictures_and_json(store: Path, documents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "pictures"
    asked = [
        "--reference",
        "5",
        "--hook-points",
        "resid_post@3,embed",
        "--labels",
        "kind",
        "--documents",
        str(documents),
    ]
    assert main(["drift", str(store), "--to", str(folder), "--json", "--quiet", *asked]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    names = ["accuracy.png", "drift.json", "norms.png", "similarity.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    found = json.loads(out)
    assert found == json.loads((folder / "drift.json").read_text())
    assert (found["reference"], found["hook_points"]) == (5, ["resid_post@3", "embed"])
    assert found["probe"]["name"] == "kind" and found["probe"]["classes"] == ["a", "b"]


def test_one_document_has_no_probe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = make_steps(tmp_path / "store", random_steps(rows=9), lengths=(9,))
    assert main(["drift", str(made.path)]) == 0
    assert "linear probe" not in capfd.readouterr().out


def test_what_is_not_there_is_refused(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "captured steps of a probe set" in refused(["drift", str(make_store(tmp_path / "plain").path)], capfd)
    assert "must be the folder of a store" in refused(["drift", str(tmp_path / "none")], capfd)
    assert "(3, 0 to 10), but is 7" in refused(["drift", str(store), "--reference", "7"], capfd)
    assert "resid_post@9" in refused(["drift", str(store), "--hook-points", "resid_post@9"], capfd)
    assert "--documents" in refused(["drift", str(store), "--labels", "kind"], capfd)
    assert "--labels" in refused(["drift", str(store), "--documents", "docs.jsonl"], capfd)
    assert "above 0" in refused(["drift", str(store), "--max-norm", "0"], capfd)
    (tmp_path / "file").write_text("")
    assert "--to" in refused(["drift", str(store), "--to", str(tmp_path / "file")], capfd)


def test_other_documents_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ids = list(range(sum(LENGTHS)))
    made = make_steps(tmp_path / "store", random_steps((0, 5)), token_ids={0: ids, 5: ids[::-1]})
    assert "the same tokens at step 5 as at step 0" in refused(["drift", str(made.path)], capfd)


def test_without_matplotlib_the_extra_is_named(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    folder = tmp_path / "pictures"
    assert "the extra `pictures`" in refused(["drift", str(store), "--to", str(folder)], capfd)
    assert not folder.exists()
    assert main(["drift", str(store)]) == 0
