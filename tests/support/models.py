"""Random Qwen2 models small enough for a test, saved as Hugging Face folders, and their states by transformers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_qwen_hidden.hookpoint import HookPoint

VOCAB = 384


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Sizes of a tiny model."""

    layers: int
    groups: int
    tied: bool
    heads: int = 4

    @property
    def name(self) -> str:
        return f"l{self.layers}-g{self.groups}-{'tied' if self.tied else 'untied'}"


TINY = (
    Tiny(layers=5, groups=4, tied=False),
    Tiny(layers=3, groups=2, tied=True),
    Tiny(layers=5, groups=1, tied=True),
)


def save_tiny(folder: Path, tiny: Tiny, *, max_shard_size: str = "5GB", **config: object) -> Path:
    """Weights in which every parameter matters: random biases and norms too."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": VOCAB - 1,  # odd: tp pads it
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.groups,
        "max_position_embeddings": 128,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tiny.tied,
        "dtype": "float32",
    }
    generator = torch.Generator().manual_seed(7)
    model = Qwen2ForCausalLM(Qwen2Config(**{**sizes, **config})).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.1 if name.endswith("bias") else 0.08, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_documents(file: Path, lengths: tuple[int, ...], seed: int = 3) -> Path:
    """A JSONL file of documents of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist() for length in lengths)
    file.write_text(
        "".join(json.dumps({"id": f"{file.stem}-{n}", "token_ids": each}) + "\n" for n, each in enumerate(ids))
    )
    return file


@dataclass(frozen=True)
class Batch:
    """Ragged documents: input_ids [batch, tokens], padded with id 0, and the length of each."""

    input_ids: torch.Tensor
    lengths: tuple[int, ...]


def ragged_batch(lengths: tuple[int, ...] = (17, 40, 1, 29, 6), vocab: int = VOCAB - 1, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    return Batch(ids, lengths)


def transformers_states(
    folder: Path, batch: Batch, dtype: torch.dtype = torch.float32
) -> list[dict[HookPoint, torch.Tensor]]:
    """For each document alone (no padding), every hook point's state [tokens, hidden] by transformers.

    The last ``resid_post`` is not in its ``hidden_states`` tuple and is taken by a hook of its own.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    layers = model.config.num_hidden_layers
    last: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, output: object) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    model.model.layers[-1].register_forward_hook(keep)
    documents = []
    for row, length in enumerate(batch.lengths):
        with torch.no_grad():
            states = model.model(batch.input_ids[row : row + 1, :length], output_hidden_states=True).hidden_states
        found = {HookPoint("embed"): states[0], HookPoint("final_norm"): states[layers]}
        found |= {HookPoint("resid_post", n - 1): states[n] for n in range(1, layers)}
        found[HookPoint("resid_post", layers - 1)] = last.pop()
        documents.append({point: state.reshape(length, -1) for point, state in found.items()})
    return documents


def relative_error(states: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest, over tokens, of |states - reference| / |reference| (Euclidean norms over the hidden axis)."""
    states, reference = states.double(), reference.double()
    return float(((states - reference).norm(dim=-1) / reference.norm(dim=-1)).max())
