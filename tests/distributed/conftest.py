"""Checkpoints that NeMo's Trainer writes once for all tests."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.data.conftest import write_tokenizer
from tests.support.models import Tiny, save_tiny


@dataclass(frozen=True)
class NemoFolders:
    """Of one model: Hugging Face's folder; checkpoints with the same weights that NeMo wrote at TP2 x PP2, with the
    state of the optimizer, and at DP2 in bf16, with that of the distributed optimizer; LoRA adapters of it. trained:
    checkpoints of runs that changed the weights, and the weights that each ended with, in fp32, by Megatron's names."""

    huggingface: Path
    nemo: Path
    half: Path
    half_huggingface: Path
    adapter: Path
    partial_adapter: Path
    trained: Mapping[str, tuple[Path, Mapping[str, np.ndarray]]]


@pytest.fixture(scope="session")
def nemo_folders(tmp_path_factory: pytest.TempPathFactory) -> NemoFolders:
    from nemo_qwen_hidden.parallel.launch import run_ranks
    from nemo_qwen_hidden.topology import Topology
    from tests.support.nemo import written
    from tests.support.training import VOCAB, Job, whole_weights

    root = tmp_path_factory.mktemp("nemo")
    tiny = Tiny(layers=5, groups=2, tied=False)
    folder = save_tiny(root / "huggingface", tiny, vocab_size=VOCAB)
    write_tokenizer(folder)
    half = Path(shutil.copytree(folder, root / "half_huggingface"))
    weights = half / "model.safetensors"
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    still = Job(topology=Topology(tp=2, pp=2), steps=1, lr=0.0)
    lora = Job(topology=Topology(tp=2, pp=2), steps=2, lr=1e-2)
    every = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    work = [
        (still, folder, root / "nemo"),
        (lora, folder, root / "adapter", every),
        (lora, folder, root / "partial", ("linear_qkv", "linear_fc1")),
    ]
    run_ranks(written, (work,), world=4, log=root / "ranks.log")
    replicas = Topology(dp=2)
    still_half = Job(topology=replicas, steps=1, lr=0.0, dtype="bf16", distributed_optimizer=True)
    runs = {
        "dp2": Job(topology=replicas, steps=1),
        "dp2 bf16": Job(topology=replicas, steps=1, dtype="bf16"),
        "dp2 bf16, distributed optimizer": Job(topology=replicas, steps=1, dtype="bf16", distributed_optimizer=True),
        "dp2, reshardable distributed optimizer": Job(
            topology=replicas, steps=1, distributed_optimizer=True, strategy={"ckpt_optim_fully_reshardable": True}
        ),
        "cp2": Job(topology=Topology(cp=2), steps=1),
        "pp2 vp2": Job(topology=Topology(pp=2, vp=2), steps=1),
    }
    pairs = [(still_half, half, root / "half"), *((job, folder, root / name) for name, job in runs.items())]
    _, *ended = zip(*run_ranks(written, (pairs,), world=2, log=root / "pairs.log"), strict=True)
    trained = {name: (root / name, whole_weights(ranks)) for name, ranks in zip(runs, ended, strict=True)}
    return NemoFolders(folder, root / "nemo", root / "half", half, root / "adapter", root / "partial", trained)
