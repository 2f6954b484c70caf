"""Checkpoints in other forms, and what a rank holds of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.checkpoint.tensors import TensorFiles
from nemo_qwen_hidden.plan.footprint import weight_bytes
from nemo_qwen_hidden.plan.stages import split_layers
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import TINY, Tiny, ragged_batch, relative_error, save_tiny, transformers_states
from tests.support.ranks import custom_layout, gathered, loaded


def without_prefix(source: Path, to: Path) -> Path:
    """The same decoder as transformers' bare ``Qwen2Model`` saves it: no ``model.``, no output layer, config of 5.x."""
    to.mkdir()
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(bare, to / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_indexed_and_bare_checkpoints(tiny_folders: dict[Tiny, Path], tmp_path: Path, start_ranks: Start) -> None:
    tiny, batch = TINY[0], ragged_batch((9, 4))
    indexed = save_tiny(tmp_path / "indexed", tiny, max_shard_size="100KB")
    assert (indexed / "model.safetensors.index.json").is_file()
    bare = without_prefix(tiny_folders[tiny], tmp_path / "bare")
    reference = transformers_states(tiny_folders[tiny], batch)
    topology = Topology(tp=2, pp=2)
    for (states,) in start_ranks(topology.world, gathered, topology, [indexed, bare], batch, ({},))[0]:
        for point, values in states.items():
            for row, length in enumerate(batch.lengths):
                assert relative_error(torch.from_numpy(values[row, :length]), reference[row][point]) <= 5e-6


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, pp=2), Topology(pp=3)], ids=str)
def test_a_rank_holds_what_the_plan_says_and_no_output_layer(
    topology: Topology, tiny_folders: dict[Tiny, Path], start_ranks: Start
) -> None:
    folder = tiny_folders[TINY[1]]
    shape = read_architecture(folder).shape
    stages = split_layers(shape.num_layers, topology.pp)
    for rank, (own, _, names) in enumerate(start_ranks(topology.world, loaded, topology, folder, "bf16")):
        stage = topology.at(rank).pp
        assert own == weight_bytes(
            shape,
            layers=len(stages[stage]),
            tp=topology.tp,
            first=stage == 0,
            final_norm=stage == topology.pp - 1,
            itemsize=2,
        )
        assert not any("output_layer" in name for name in names)
        assert any("word_embeddings" in name for name in names) == (stage == 0)


def test_a_single_file_wins_over_an_index_as_in_transformers(tiny_folders: dict[Tiny, Path], tmp_path: Path) -> None:
    both = save_tiny(tmp_path / "both", TINY[0], max_shard_size="100KB")
    (both / "model.safetensors").write_bytes((tiny_folders[TINY[0]] / "model.safetensors").read_bytes())
    assert set(TensorFiles.of(both).files.values()) == {"model.safetensors"}


def test_stages_of_another_split(tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    """One layer and four: the stages are what the model has, not what an even split would give; and values do not
    depend on autocast around the call."""
    batch, folder = ragged_batch((9, 4)), tiny_folders[TINY[0]]
    layout = [["embedding", "decoder"], ["decoder"] * 4 + ["loss"]]
    (sizes, states), _ = start_ranks(2, custom_layout, folder, batch, layout)
    assert sizes == [1, 4]
    reference = transformers_states(folder, batch)
    for point, values in states.items():
        for row, length in enumerate(batch.lengths):
            assert relative_error(torch.from_numpy(values[row, :length]), reference[row][point]) <= 5e-6
