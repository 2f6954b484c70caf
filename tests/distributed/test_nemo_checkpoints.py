"""Checkpoints written by NeMo's Trainer in one layout, opened in others."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_qwen_hidden.checkpoint.adapter import Adapter
from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.checkpoint.fingerprint import weights_sha256
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.conversion import convert
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.distributed.conftest import NemoFolders
from tests.support.crafted_nemo import craft, make_hostile
from tests.support.models import TINY, Tiny, ragged_batch, relative_error, transformers_states
from tests.support.nemo import alone, lora_applied, merged, reopened
from tests.support.ranks import gathered, losses
from tests.support.training import whole_weights

LAYOUTS = [Topology(), Topology(pp=3), Topology(tp=2, sp=True), Topology(tp=2, pp=2)]


@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
def test_any_layout_opens_what_tp2_pp2_wrote(topology: Topology, nemo_folders: NemoFolders, start_ranks: Start) -> None:
    """With the state of the optimizer beside them: the same bits as from the Hugging Face folder in that layout, and
    transformers' states."""
    batch = ragged_batch((17, 40, 1, 6), vocab=384)
    folders = [nemo_folders.huggingface, nemo_folders.nemo]
    (theirs,), (ours,) = start_ranks(topology.world, gathered, topology, folders, batch, ({},))[0]
    reference = transformers_states(nemo_folders.huggingface, batch)
    assert list(ours) == list(theirs)
    for point, values in ours.items():
        np.testing.assert_array_equal(values, theirs[point], err_msg=str(point))
        for row, length in enumerate(batch.lengths):
            assert relative_error(torch.from_numpy(values[row, :length]), reference[row][point]) <= 5e-6


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, sp=True), Topology(pp=3)], ids=str)
def test_a_trained_checkpoint_has_the_weights_that_the_run_ended_with(
    topology: Topology, nemo_folders: NemoFolders, start_ranks: Start
) -> None:
    """Of replicas, context-parallel ranks and virtual stages, whatever the optimizer keeps beside them: with bf16 those
    that the model computes with, and not the optimizer's in fp32."""
    folders = [folder for folder, _ in nemo_folders.trained.values()]
    opened = zip(*start_ranks(topology.world, reopened, topology, folders), strict=True)
    before = load_file(nemo_folders.huggingface / "model.safetensors")["model.norm.weight"].numpy()
    for (name, (folder, ended)), ranks in zip(nemo_folders.trained.items(), opened, strict=True):
        found = whole_weights(ranks)
        assert sorted(found) == sorted(ended), name
        for tensor, values in ended.items():
            np.testing.assert_array_equal(found[tensor], values, err_msg=f"{name}: {tensor}")
        assert not np.array_equal(ended["decoder.final_layernorm.weight"], before)
        weights = open_weights(folder, read_architecture(folder))
        assert {weights.dtype(each) for each in weights.names} == {"BF16" if "bf16" in name else "F32"}
        kept = " ".join(each for each in weights.stored.tensors if each.startswith("optimizer."))
        assert ("optimizer.distributed." in kept) is (name == "dp2 bf16, distributed optimizer")
        assert ("param" in kept) is ("bf16" in name or "distributed" in name)


def test_a_process_without_groups_opens_it_too(nemo_folders: NemoFolders, start_ranks: Start) -> None:
    batch = ragged_batch((7, 3), vocab=384)
    one, other = (start_ranks(1, alone, folder, batch)[0] for folder in (nemo_folders.huggingface, nemo_folders.nemo))
    np.testing.assert_array_equal(one, other)


def test_ranks_execute_nothing_of_a_checkpoint(
    tiny_folders: dict[Tiny, Path], tmp_path: Path, start_ranks: Start
) -> None:
    nemo = craft(tiny_folders[TINY[0]], tmp_path / "nemo")
    make_hostile(nemo, tmp_path / "executed")
    folders = [tiny_folders[TINY[0]], nemo]
    (theirs,), (ours,) = start_ranks(2, gathered, Topology(tp=2), folders, ragged_batch((5,)), ({},))[0]
    for point, values in ours.items():
        np.testing.assert_array_equal(values, theirs[point], err_msg=str(point))
    assert not (tmp_path / "executed").exists()


def test_half_precision_and_the_output_layer(nemo_folders: NemoFolders, start_ranks: Start) -> None:
    batch = ragged_batch((9, 4), vocab=384)
    pair = [nemo_folders.half_huggingface, nemo_folders.half]
    (theirs,), (ours,) = start_ranks(2, gathered, Topology(pp=2), pair, batch, ({},), "bf16")[0]
    for point, values in ours.items():
        np.testing.assert_array_equal(values, theirs[point], err_msg=str(point))
    whole = [nemo_folders.huggingface, nemo_folders.nemo]
    one, other = start_ranks(2, losses, Topology(tp=2), whole, batch)[0]
    np.testing.assert_array_equal(one, other)


def test_the_fingerprint_is_that_of_the_huggingface_folder(nemo_folders: NemoFolders) -> None:
    def fingerprint(folder: Path) -> str:
        return weights_sha256(open_weights(folder, read_architecture(folder)))

    assert fingerprint(nemo_folders.nemo) == fingerprint(nemo_folders.huggingface)
    assert fingerprint(nemo_folders.half) == fingerprint(nemo_folders.half_huggingface)


POINTS = ("embed", "resid_post@0", "resid_post@1", "resid_post@4", "final_norm")


def test_a_merged_adapter_gives_the_states_of_nemos_own_lora(
    nemo_folders: NemoFolders, tmp_path: Path, start_ranks: Start
) -> None:
    """While a model is loaded, and by transformers in the folder that ``convert`` has written."""
    batch, adapter = ragged_batch((17, 6), vocab=384), nemo_folders.adapter
    applied = start_ranks(1, lora_applied, nemo_folders.huggingface, adapter, batch, POINTS)[0]
    plain = transformers_states(nemo_folders.huggingface, batch)
    folders = [nemo_folders.huggingface, nemo_folders.nemo]
    for topology in (Topology(), Topology(tp=2, sp=True), Topology(pp=2)):
        (theirs, _, _), (ours, _, _) = start_ranks(topology.world, merged, topology, folders, adapter, batch, POINTS)[0]
        for point, values in ours.items():
            np.testing.assert_array_equal(values, theirs[point])
            for row, length in enumerate(batch.lengths):
                found = torch.from_numpy(values[row, :length])
                assert relative_error(found, torch.from_numpy(applied[point][row, :length])) <= 5e-6
                if point.site != "embed":
                    assert relative_error(found, plain[row][point]) > 1e-2  # it does something
    convert(str(nemo_folders.nemo), str(tmp_path / "merged"), adapter=str(adapter))
    (whole,) = start_ranks(1, gathered, Topology(), [tmp_path / "merged"], batch, ({"hook_points": list(POINTS)},))[0]
    ((merged_while_loaded, _, _),) = start_ranks(1, merged, Topology(), [nemo_folders.nemo], adapter, batch, POINTS)[0]
    written = transformers_states(tmp_path / "merged", batch)
    for point, values in whole[0].items():
        np.testing.assert_array_equal(values, merged_while_loaded[point])
        for row, length in enumerate(batch.lengths):
            assert relative_error(written[row][point], torch.from_numpy(applied[point][row, :length])) <= 5e-6


def test_convert_merges_as_peft_does(nemo_folders: NemoFolders, tmp_path: Path) -> None:
    """With the matrices of query, key and value taken out of Megatron's by hand, logits of the merged model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    convert(str(nemo_folders.nemo), str(tmp_path / "merged"), adapter=str(nemo_folders.adapter))
    matrices = lora_by_huggingface_names(nemo_folders.adapter)
    model = AutoModelForCausalLM.from_pretrained(nemo_folders.huggingface, dtype=torch.float32)
    linears = sorted({name.rpartition(".")[2] for name in matrices})
    theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=linears))
    filled = 0
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            down, up = matrices[name.removeprefix("base_model.model.model.")]
            module.lora_A["default"].weight.data.copy_(down)
            module.lora_B["default"].weight.data.copy_(up)
            filled += 1
    assert filled == len(matrices) == 5 * 7
    ids = ragged_batch((21,), vocab=384).input_ids
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        before, expected = model_logits(nemo_folders.huggingface, ids), theirs.eval()(ids).logits
        found = ours(ids).logits
        unloaded = theirs.merge_and_unload()(ids).logits
    assert relative_error(found, expected) <= 2e-5
    assert relative_error(found, unloaded) <= 2e-5
    assert relative_error(found, before) > 1e-2


def model_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return logits


def lora_by_huggingface_names(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each linear of the model with 5 layers, 4 heads of 16 in 2 groups; read by torch's own reader."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        metadata = FileSystemReader(adapter / "weights").read_metadata()
        stored: dict[str, Any] = {
            name: torch.empty(record.size)
            for name, record in metadata.state_dict_metadata.items()
            if ".adapter." in name and not name.startswith("optimizer") and isinstance(record, TensorStorageMetadata)
        }
        dcp.load(stored, checkpoint_id=str(adapter / "weights"), no_dist=True)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, downs in stored.items():
        if not name.endswith("linear_in.weight"):
            continue
        ups = stored[name.replace("linear_in", "linear_out")]
        linear = name.split("decoder.layers.")[1].removesuffix(".adapter.linear_in.weight")
        for layer, (down, up) in enumerate(zip(downs, ups, strict=True)):
            if linear == "self_attention.linear_qkv":
                by_group = up.reshape(2, 4, 16, -1)  # of a group two heads' q, then k, then v
                parts = {
                    "self_attn.q_proj": by_group[:, :2],
                    "self_attn.k_proj": by_group[:, 2],
                    "self_attn.v_proj": by_group[:, 3],
                }
            elif linear == "mlp.linear_fc1":
                parts = {"mlp.gate_proj": up[:128], "mlp.up_proj": up[128:]}
            else:
                parts = {
                    {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}[linear]: up
                }
            for theirs, part in parts.items():
                found[f"layers.{layer}.{theirs}"] = down, part.reshape(-1, down.shape[0])
    return found


def test_convert_rounds_a_merged_weight_once(nemo_folders: NemoFolders, tmp_path: Path) -> None:
    """In bf16, against the sum in fp64: never further than half a step of bf16 away."""
    convert(str(nemo_folders.half), str(tmp_path / "merged"), adapter=str(nemo_folders.partial_adapter))
    found, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", nemo_folders.half_huggingface)
    )
    matrices = lora_by_huggingface_names(nemo_folders.partial_adapter)
    assert {name.rpartition(".")[2] for name in matrices} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert found.keys() == before.keys()
    for name, weight in found.items():
        key = name.removeprefix("model.").removesuffix(".weight")
        assert weight.dtype == torch.bfloat16
        if key not in matrices:
            assert torch.equal(weight, before[name]), name
            continue
        down, up = (matrix.double() for matrix in matrices[key])
        exact = before[name].double() + 6 / 4 * (up @ down)
        step = 2.0 ** (exact.abs().log2().floor() - 7)
        assert ((weight.double() - exact).abs() <= step / 2 + 1e-7).all(), name
        assert not torch.equal(weight, before[name])


def test_an_adapter_is_added_in_fp32_and_rounded_once(nemo_folders: NemoFolders, start_ranks: Start) -> None:
    """By numpy from the matrices themselves, whose values NeMo's file has."""
    batch, folder = ragged_batch((3,), vocab=384), nemo_folders.huggingface
    folders = [folder, nemo_folders.nemo]
    found = start_ranks(1, merged, Topology(), folders, nemo_folders.partial_adapter, batch, ("embed",))[0]
    shape = read_architecture(folder).shape
    stored = Adapter.of(nemo_folders.partial_adapter, shape).stored
    names = {name.split("decoder.layers.")[1]: name for name in stored.tensors if not name.startswith("optimizer")}
    for _, wide, rounded in found:
        plain = open_weights(nemo_folders.nemo, read_architecture(folder)).stored
        for linear in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            down, up = (
                stored.read(names[f"{linear}.adapter.linear_{side}.weight"], slice(1, 2))[0] for side in ("in", "out")
            )
            base = plain.read(f"module.module.decoder.layers.{linear}.weight", slice(1, 2))[0]
            expected = base.numpy() + (up.numpy() @ down.numpy()) * np.float32(6 / 4)
            parameter = f"module.decoder.layers.1.{linear}.weight"
            np.testing.assert_allclose(wide[parameter], expected, rtol=0, atol=1e-6)
            once = torch.from_numpy(wide[parameter]).bfloat16().float().numpy()
            np.testing.assert_array_equal(rounded[parameter], once)
        untouched = plain.read("module.module.decoder.layers.mlp.linear_fc2.weight", slice(1, 2))[0]
        np.testing.assert_array_equal(wide["module.decoder.layers.1.mlp.linear_fc2.weight"], untouched.numpy())


def test_the_layout_of_an_adapter_is_read_from_what_nemo_writes(nemo_folders: NemoFolders) -> None:
    shape = read_architecture(nemo_folders.huggingface).shape
    whole, part = (Adapter.of(folder, shape) for folder in (nemo_folders.adapter, nemo_folders.partial_adapter))
    assert (whole.dim, whole.alpha, len(whole.pairs)) == (4, 6, 20)
    assert part.linears(3) == ("self_attention.linear_qkv", "mlp.linear_fc1")
    assert len(part.pairs) == 10
    assert whole.sha256 != part.sha256 == Adapter.of(nemo_folders.partial_adapter, shape).sha256
    base = json.loads((nemo_folders.adapter / "weights" / "adapter_metadata.json").read_text())
    assert list(base) == ["model_ckpt_path"]
