"""Commands at a NeMo checkpoint, and its conversion."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.conversion import TO_HUGGINGFACE, TO_NEMO, convert
from nemo_qwen_hidden.errors import UserError
from nemo_qwen_hidden.store.read.reader import open_store
from tests.conftest import Start
from tests.distributed.conftest import NemoFolders
from tests.support.crafted_nemo import craft
from tests.support.models import Tiny, ragged_batch, save_tiny, write_documents
from tests.support.nemo import converted, imported_by_nemo, importers

pytestmark = pytest.mark.distributed
POINTS = "capture.hook_points=[embed,resid_post@1,final_norm]"


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    data = write_documents(tmp_path / "data.jsonl", (5, 60, 17, 0, 9))
    return [f"data.path={data}", "data.max_tokens=16", POINTS, "runtime.threads=1", f"store.path={tmp_path / 'store'}"]


def test_a_store_begun_from_one_form_goes_on_from_the_other(
    nemo_folders: NemoFolders, settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", f"model.path={nemo_folders.nemo}", "parallel.tp=2", *settings, "--quiet"]) == 0
    store = open_store(tmp_path / "store")
    values = {name: np.asarray(store[name][:]) for name in store.hook_points}
    more = write_documents(tmp_path / "more.jsonl", (3, 4), seed=9)
    grown = [text.replace("data.jsonl", "more.jsonl") for text in settings]
    assert more.is_file()
    arguments = [f"model.path={nemo_folders.huggingface}", "parallel.pp=2", *grown, "store.add=documents", "--quiet"]
    assert main(["extract", *arguments]) == 0
    larger = open_store(tmp_path / "store")
    assert larger.rows == store.rows + 7
    for name, before in values.items():
        np.testing.assert_array_equal(larger[name][: store.rows], before)
    capfd.readouterr()
    assert main(["extract", f"model.path={nemo_folders.half}", *grown, "store.add=documents"]) == 2
    assert "must be weights of sha256" in capfd.readouterr().err


def test_text_goes_through_the_tokenizer_that_a_setting_names(
    nemo_folders: NemoFolders, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """This checkpoint was trained without one."""
    (tmp_path / "text.txt").write_text("some words")
    arguments = ["plan", f"model.path={nemo_folders.nemo}", f"data.path={tmp_path / 'text.txt'}", "data.max_tokens=16"]
    assert main(arguments) == 2
    assert "must name a tokenizer (or `model.tokenizer` a folder with one" in capfd.readouterr().err
    assert main([*arguments, f"model.tokenizer={nemo_folders.huggingface}"]) == 0
    assert main([*arguments, f"model.tokenizer={tmp_path / 'nowhere'}"]) == 2
    assert capfd.readouterr().err.startswith("nemo-qwen-hidden: `model.tokenizer` must be a folder")


def test_the_adapter_is_in_the_manifest_and_compared(
    nemo_folders: NemoFolders, settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["extract", f"model.path={nemo_folders.huggingface}", *settings]
    adapter = f"model.adapter={nemo_folders.adapter}"
    assert main([*arguments, adapter, "parallel.tp=2", "--quiet"]) == 0
    found = json.loads((tmp_path / "store" / "manifest.json").read_text())["model"]["adapter"]
    assert (found["path"], found["dim"], found["alpha"]) == (str(nemo_folders.adapter), 4, 6)
    capfd.readouterr()
    assert main([*arguments, adapter]) == 0  # nothing is left to do
    for other in ([], [f"model.adapter={nemo_folders.partial_adapter}"]):
        assert main([*arguments, *other]) == 2
        assert f"`model.adapter` must be an adapter of sha256 {found['sha256']}, as in" in capfd.readouterr().err
    assert main(["doctor", "--against", str(tmp_path / "store"), "--documents", "2", "--tokens", "8"]) == 0
    assert capfd.readouterr().out.endswith("\nhealthy\n")
    assert main(["inspect", str(tmp_path / "store")]) == 0
    assert found["sha256"][:12] in capfd.readouterr().out


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_the_doctor_finds_nothing_wrong(
    adapted: bool, nemo_folders: NemoFolders, settings: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = [f"model.adapter={nemo_folders.adapter}"] if adapted else []
    given = [f"model.path={nemo_folders.nemo}", *adapter, "parallel.tp=2", *settings]
    assert main(["doctor", *given, "--documents", "2", "--tokens", "12"]) == 0
    assert capfd.readouterr().out.endswith("\nhealthy\n")


def test_what_is_no_adapter_of_this_model(
    nemo_folders: NemoFolders, settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def says(folder: Path, model: Path = nemo_folders.huggingface) -> str:
        assert main(["extract", f"model.path={model}", f"model.adapter={folder}", *settings]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        return line

    assert "`model.adapter` must be a folder with `weights/` and `context/`" in says(tmp_path / "nowhere")
    assert "model_transform` must be NeMo's LoRA (`llm.peft.LoRA`), but is None" in says(nemo_folders.nemo)
    assert "must be a whole model, not an adapter's checkpoint" in says(nemo_folders.adapter, nemo_folders.adapter)
    other = Path(shutil.copytree(nemo_folders.adapter, tmp_path / "other"))
    context = other / "context" / "model.yaml"
    context.write_text(context.read_text().replace("  dim: 4\n", "  dim: 5\n"))
    assert "as the model and the adapter's `dim` make it, but is [5, 4, 64]" in says(other)
    context.write_text(context.read_text().replace("peft.lora.LoRA", "peft.dora.DoRA"))
    assert "must be NeMo's LoRA" in says(other)


def test_there_and_back(nemo_folders: NemoFolders, tmp_path: Path, start_ranks: Start) -> None:
    """Through NeMo's importer, and back: the same logits by transformers, to the last bit."""
    from transformers import AutoModelForCausalLM

    source, nemo, back = nemo_folders.half_huggingface, tmp_path / "nemo", tmp_path / "back"
    there = start_ranks(1, converted, source, nemo)[0]
    home = convert(str(nemo), str(back))
    assert (there.direction, home.direction, there.sha256) == (TO_NEMO, TO_HUGGINGFACE, home.sha256)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (back, source))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ids = ragged_batch((19,), vocab=384).input_ids
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() == 0.0
    for name in ("tokenizer.json", "generation_config.json"):
        assert json.loads((back / name).read_text()) == json.loads((source / name).read_text())


def test_both_ways_merge_an_adapter_into_the_same_weights(
    nemo_folders: NemoFolders, tmp_path: Path, start_ranks: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = str(nemo_folders.adapter)
    there = start_ranks(1, converted, nemo_folders.half_huggingface, tmp_path / "nemo", adapter)[0]
    assert there.direction == TO_NEMO
    assert main(["convert", str(nemo_folders.half), str(tmp_path / "back"), "--adapter", adapter, "--quiet"]) == 0
    assert f"(weights sha256 {there.sha256[:12]}, as in {nemo_folders.half} with {adapter} merged in)" in (
        capfd.readouterr().out
    )
    assert _sha256(tmp_path / "nemo") == _sha256(tmp_path / "back") == there.sha256
    assert there.sha256 != _sha256(nemo_folders.half)
    one, other = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "back", nemo_folders.half_huggingface)
    )
    assert one.keys() == other.keys()


def test_convert_refuses_an_adapter_of_another_model(
    nemo_folders: NemoFolders, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def says(adapter: Path, source: Path = nemo_folders.nemo) -> str:
        assert main(["convert", str(source), str(tmp_path / "new"), "--adapter", str(adapter)]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert not (tmp_path / "new").exists()
        return line

    assert "`--adapter` must be a folder with `weights/` and `context/`" in says(tmp_path / "nowhere")
    assert "`--adapter: context/model.yaml: model_transform` must be NeMo's LoRA" in says(nemo_folders.nemo)
    fewer = craft(save_tiny(tmp_path / "fewer", Tiny(layers=4, groups=2, tied=False)), tmp_path / "fewer-nemo")
    assert "must have shape [4, 4, 64], as the model and the adapter's `dim` make it" in says(
        nemo_folders.adapter, fewer
    )
    other = Path(shutil.copytree(nemo_folders.adapter, tmp_path / "other"))
    context = other / "context" / "model.yaml"
    context.write_text(context.read_text().replace("peft.lora.LoRA", "peft.canonical_lora.CanonicalLoRA"))
    assert "must be NeMo's LoRA (`llm.peft.LoRA`), but is 'nemo.collections.llm.peft.canonical" in says(other)


def test_nemos_own_command_imports_right_once_the_importer_is_registered(
    nemo_folders: NemoFolders, tmp_path: Path, start_ranks: Start
) -> None:
    start_ranks(1, imported_by_nemo, nemo_folders.huggingface, tmp_path / "nemo")
    assert convert(str(tmp_path / "nemo"), str(tmp_path / "back")).sha256 == _sha256(nemo_folders.huggingface)


def test_each_part_of_our_importer_is_needed(nemo_folders: NemoFolders, tmp_path: Path, start_ranks: Start) -> None:
    """Where one of these fails, ``training/importer.py`` can do without the part that it names."""
    found, tidied = start_ranks(1, importers, nemo_folders.half_huggingface, tmp_path)[0]
    norm = load_file(nemo_folders.half_huggingface / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert found["ours"] == (str(float(norm[0])), False)
    assert found["nemo_setup"][0] == "ImportError"  # asynchronous checkpoints, before CUDA is asked for
    assert found["config"] == ("AssertionError", True)  # norms in fp32; True: `_without_groups_afterwards`
    assert found["convert_state"][0] == "1.0" != str(float(norm[0]))  # norms that were passed over
    assert tidied


def test_nemo_takes_one_folder_for_the_tokenizers_of_all_imports() -> None:
    """And trusts the code that comes with one."""
    (nemo,) = find_spec("nemo").submodule_search_locations  # type: ignore[union-attr, misc]
    source = Path(nemo, "lightning/io/connector.py").read_text(encoding="utf-8")
    assert 'save_path="/tmp/nemo_tokenizer"' in source
    assert "from_pretrained(tokenizer_name_or_path, trust_remote_code=True)" in source


def test_convert_executes_no_code_of_a_tokenizer(
    nemo_folders: NemoFolders, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(nemo_folders.huggingface, tmp_path / "folder"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 2
    assert "`SOURCE: tokenizer_config.json` must have no `auto_map`" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def _sha256(folder: Path) -> str:
    from nemo_qwen_hidden.checkpoint.architecture import read_architecture
    from nemo_qwen_hidden.checkpoint.fingerprint import weights_sha256
    from nemo_qwen_hidden.checkpoint.opened import open_weights

    return weights_sha256(open_weights(folder, read_architecture(folder)))


def test_a_trained_checkpoint_of_four_ranks_becomes_a_huggingface_folder(
    nemo_folders: NemoFolders, tmp_path: Path
) -> None:
    assert convert(str(nemo_folders.nemo), str(tmp_path / "back")).sha256 == _sha256(nemo_folders.huggingface)


def test_what_convert_refuses(nemo_folders: NemoFolders, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there"
    there.mkdir()
    assert main(["convert", str(nemo_folders.nemo), str(there)]) == 2
    assert "`TARGET` must not be there yet" in capfd.readouterr().err
    assert main(["convert", str(nemo_folders.nemo), str(tmp_path / "no" / "folder")]) == 2
    assert "`TARGET` must lie in a folder that is there" in capfd.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    assert "`SOURCE` must be a folder with config.json" in capfd.readouterr().err
    bare = Path(shutil.copytree(nemo_folders.huggingface, tmp_path / "bare"))
    (bare / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"`SOURCE` must hold generation_config\.json"):
        convert(str(bare), str(tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "there"]
