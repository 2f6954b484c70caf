"""On a GPU: the states of transformers, with Transformer Engine's layers where it is installed.

docs/layouts.md says what each case shows that no CPU can.
"""

from pathlib import Path

import pytest
import torch

from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, LAYERLESS_SITES, SITES
from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.hf_sites import transformers_sites
from tests.support.models import TINY, Batch, Tiny, ragged_batch, relative_error, transformers_states
from tests.support.ranks import gathered

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# bf16: two roundings of 2**-8 a layer, over 3 layers. fp32: local layers, since Transformer Engine would round to TF32
BOUNDS = {"bf16": 0.03, "fp32": 5e-6}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_states_on_one_gpu(dtype: str, packing: bool, tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    batch, folder = ragged_batch(), tiny_folders[TINY[1]]
    ((states,),) = start_ranks(1, gathered, Topology(), [folder], batch, ({"packing": packing},), dtype)[0]
    reference = transformers_states(folder, batch)
    for point, values in states.items():
        for row, length in enumerate(batch.lengths):
            assert relative_error(torch.from_numpy(values[row, :length]), reference[row][point]) <= BOUNDS[dtype]


EVERY_SITE = tuple(site if site in LAYERLESS_SITES else f"{site}@:" for site in SITES)
LAYOUTS = (
    Topology(),
    Topology(tp=2, sp=True),
    Topology(pp=2),
    Topology(cp=2),  # Transformer Engine's own, in bf16
    Topology(tp=2, cp=2, sp=True),
    Topology(pp=2, vp=2),
)


def model_for(topology: Topology) -> Tiny:
    """Layers enough for its stages."""
    return next(tiny for tiny in (TINY[1], TINY[0]) if tiny.layers >= topology.stages)


def require_gpus(world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
def test_every_site(
    topology: Topology, dtype: str, packing: bool, tiny_folders: dict[Tiny, Path], start_ranks: Start
) -> None:
    """Over all tokens of a document: a single state that a sum makes small has no bits to spare in bf16."""
    require_gpus(topology.world)
    batch, folder = ragged_batch(), tiny_folders[model_for(topology)]
    chosen = {"hook_points": EVERY_SITE, "packing": packing}
    ((states,),) = start_ranks(topology.world, gathered, topology, [folder], batch, (chosen,), dtype)[0]
    for row, (length, reference) in enumerate(zip(batch.lengths, transformers_sites(folder, batch), strict=True)):
        assert set(states) == set(reference)
        for point, expected in reference.items():
            ours = torch.from_numpy(states[point][row, :length])
            ours = ours[..., :length] if point.site == ATTN_WEIGHTS else ours
            error = relative_error(ours.reshape(1, -1), expected.reshape(1, -1))
            assert error <= BOUNDS[dtype], (str(point), row, error)


def steered(rank: Rank, topology: Topology, folder: Path, batch: Batch, dtype: str) -> torch.Tensor:
    from nemo_qwen_hidden.capture import edits
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, dtype=dtype, output_layer=True)
        vector = torch.ones(model.config.hidden_size)
        chosen = [edits.add("resid_mid@1", vector), edits.zero("attn_out@2"), edits.scale("resid_post@0", 0.5)]
        return model.logits(batch.input_ids, lengths=batch.lengths, edits=chosen).float().cpu().numpy()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
def test_an_edit(topology: Topology, dtype: str, tiny_folders: dict[Tiny, Path], start_ranks: Start) -> None:
    """Against the fp32 logits of plain hooks on transformers."""
    from transformers import AutoModelForCausalLM

    require_gpus(topology.world)
    batch, folder = ragged_batch(), tiny_folders[model_for(topology)]
    ours = torch.from_numpy(start_ranks(topology.world, steered, topology, folder, batch, dtype)[0])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.model.layers
    layers[0].register_forward_hook(lambda _module, _inputs, output: output / 2)
    # the residual stream behind the attention block is only seen as a sum: what attention gives carries the vector
    layers[1].self_attn.register_forward_hook(lambda _module, _inputs, output: (output[0] + 1, *output[1:]))
    layers[2].self_attn.register_forward_hook(lambda _module, _inputs, output: (0 * output[0], *output[1:]))
    for row, length in enumerate(batch.lengths):
        with torch.no_grad():
            expected = model(batch.input_ids[row : row + 1, :length], use_cache=False).logits[0, -1]
        assert relative_error(ours[row], expected) <= BOUNDS[dtype], row
