"""On a GPU: the states of transformers, with Transformer Engine's layers where it is installed."""

from pathlib import Path

import pytest
import torch

from nemo_qwen_hidden.topology import Topology
from tests.conftest import Start
from tests.support.models import TINY, Tiny, ragged_batch, relative_error, transformers_states
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
