"""Importing costs nothing, and reading or checking a store needs no more than it must."""

from importlib.util import find_spec
from pathlib import Path

import pytest

import nemo_qwen_hidden
from nemo_qwen_hidden.store.write import session
from tests.store.helpers import make_store, python

LOADED = """
import sys
{}
heavy = {{"torch", "numpy", "nemo", "megatron", "lightning", "fsspec", "transformers", "tokenizers", "hydra"}}
print(*sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import nemo_qwen_hidden", ""),
        ("import nemo_qwen_hidden; nemo_qwen_hidden.HookPoint", ""),
        ("from nemo_qwen_hidden.store.write import session; from nemo_qwen_hidden.store.read import tokens", "numpy"),
        ("from nemo_qwen_hidden import open_store; from nemo_qwen_hidden.store.read import describe", "numpy"),
        ("from nemo_qwen_hidden.store.write import writer", "numpy torch"),
        ("from nemo_qwen_hidden import RowBatches, DocumentBatches, BatchLoader", "numpy torch"),
        ("from nemo_qwen_hidden.cli.main import main", ""),
        (
            "from nemo_qwen_hidden.cli import runner, show",
            "numpy",
        ),  # what the starter of ranks imports before NeMo does
    ],
)
def test_what_an_import_loads(statement: str, loaded: str) -> None:
    assert python(LOADED.format(statement)) == [loaded]


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"], ["plan", "--help"], ["--version"]])
def test_help_loads_nothing(arguments: list[str]) -> None:
    statement = f"""
from nemo_qwen_hidden.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code
"""
    assert python(LOADED.format(statement))[-1] == ""


@pytest.mark.parametrize("override", ["parallel.tq=2", "parallel.tp=3", "model.path=nowhere/at/all"])
def test_what_cannot_be_done_is_said_without_torch(override: str) -> None:
    statement = (
        f"from nemo_qwen_hidden.cli.main import main; assert main(['extract', 'store.path=s', '{override}']) == 2"
    )
    assert {"torch", "nemo", "megatron", "transformers"}.isdisjoint(python(LOADED.format(statement))[-1].split())


@pytest.mark.parametrize(("then", "loaded"), [("", "numpy"), ("['resid_post@3'][:1]", "numpy torch")])
def test_opening_a_store_waits_for_torch_until_states_are_read(tmp_path: Path, then: str, loaded: str) -> None:
    make_store(tmp_path / "store")
    opened = f"open_store({str(tmp_path / 'store')!r}){then}"
    assert python(LOADED.format(f"from nemo_qwen_hidden import open_store; {opened}")) == [loaded]


def test_public_names() -> None:
    from nemo_qwen_hidden.hookpoint import HookPoint
    from nemo_qwen_hidden.store.read.reader import open_store

    assert nemo_qwen_hidden.open_store is open_store
    assert nemo_qwen_hidden.HookPoint is HookPoint
    assert {"open_store", "RowBatches", "HookPoint", "Qwen2HiddenModel", "__version__"} <= set(dir(nemo_qwen_hidden))
    assert find_spec(nemo_qwen_hidden._HOMES["Qwen2HiddenModel"]) is not None
    with pytest.raises(AttributeError, match="module 'nemo_qwen_hidden' has no attribute 'open_stor'"):
        _ = nemo_qwen_hidden.open_stor


def test_the_store_knows_no_model_and_no_process_group() -> None:
    for path in Path(session.__file__).parent.glob("*.py"):
        imports = [line.split()[1] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        ours = [name for name in imports if name.startswith("nemo_qwen_hidden")]
        allowed = tuple(f"nemo_qwen_hidden.{room}" for room in ("store", "plan", "trace", "errors", "hookpoint"))
        assert all(name.startswith(allowed) for name in ours), path
        assert not [name for name in imports if name.startswith(("torch.distributed", "safetensors", "pickle"))], path
