"""Every site as TransformerLens has it, of a Qwen2 folder, with no weight folded or centred.

TransformerLens is an extra (``lens`` in setup.py), so it is imported where it is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, LAYERLESS_SITES, SITES, HookPoint
from nemo_qwen_hidden.parallel.launch import Rank
from tests.support.models import Batch

# docs/sites.md has the same names
HOOKS = {
    "embed": "hook_embed",
    "resid_pre": "blocks.{i}.hook_resid_pre",
    "q": "blocks.{i}.attn.hook_q",
    "k": "blocks.{i}.attn.hook_k",
    "v": "blocks.{i}.attn.hook_v",
    "rot_q": "blocks.{i}.attn.hook_rot_q",
    "rot_k": "blocks.{i}.attn.hook_rot_k",
    "attn_weights": "blocks.{i}.attn.hook_pattern",
    "z": "blocks.{i}.attn.hook_z",
    "attn_out": "blocks.{i}.hook_attn_out",
    "resid_mid": "blocks.{i}.hook_resid_mid",
    "mlp_act": "blocks.{i}.mlp.hook_post",
    "mlp_out": "blocks.{i}.hook_mlp_out",
    "resid_post": "blocks.{i}.hook_resid_post",
    "final_norm": "unembed.hook_in",
}


def bridge(folder: Path) -> Any:
    """``TransformerBridge``: transformers' modules, with an attention of TransformerLens' own."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())  # asked for, and not used: documents are tokens
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32, tokenizer=tokenizer)


def hooked(folder: Path) -> Any:
    """``HookedTransformer``: every layer TransformerLens' own, with the weights that transformers reads."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config
    from transformer_lens.pretrained.weight_conversions import convert_qwen2_weights
    from transformers import Qwen2ForCausalLM

    # its from_pretrained takes names of the hub alone; these are the steps in it
    settings = {**convert_hf_model_config(str(folder)), "device": "cpu", "tokenizer_name": None, "init_weights": False}
    config = HookedTransformerConfig.from_dict(settings)
    model = HookedTransformer(config)
    state = convert_qwen2_weights(Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model


def lens_sites(model: Any, batch: Batch) -> list[dict[HookPoint, torch.Tensor]]:
    """For each document alone, every hook point's state, in the shapes of ``hf_sites.transformers_sites``."""
    points = [
        HookPoint(site, layer)
        for site in SITES
        for layer in ([None] if site in LAYERLESS_SITES else range(model.cfg.n_layers))
    ]
    documents = []
    for row, length in enumerate(batch.lengths):
        with torch.no_grad():
            _, cache = model.run_with_cache(batch.input_ids[row : row + 1, :length])
        documents.append(
            {point: _as_here(point, cache[HOOKS[point.site].format(i=point.layer)][0]) for point in points}
        )
    return documents


def of_folders(rank: Rank, folders: Sequence[Path], batch: Batch) -> list[list[list[dict[HookPoint, Any]]]]:
    """For ``bridge`` and ``hooked``, for each folder, ``lens_sites`` as arrays. To be run as a rank, since what is
    imported for it changes how libraries log in a whole process."""
    torch.set_num_threads(1)
    found = [[lens_sites(load(folder), batch) for folder in folders] for load in (bridge, hooked)]
    return [[[_arrays(document) for document in documents] for documents in models] for models in found]


def _arrays(document: dict[HookPoint, torch.Tensor]) -> dict[HookPoint, Any]:
    return {point: state.detach().numpy() for point, state in document.items()}


def _as_here(point: HookPoint, state: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] with heads side by side; weights [heads, tokens, keys] with tokens first."""
    return state.transpose(0, 1) if point.site == ATTN_WEIGHTS else state.flatten(1)
