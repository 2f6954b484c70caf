"""Held-out loss of a saved demo model, against a unigram baseline.

    python recipes/demo_model/evaluate.py nemo_qwen_hidden/demo/model

Needs the Python version that the model was trained with: the documents come out of the interpreter.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Document, split
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

WINDOW_TOKENS = 256


@dataclass(frozen=True)
class Figures:
    """Losses in nats per token over the same held-out tokens, end tokens of documents included."""

    model: float
    unigram: float
    tokens: int
    text_bytes: int

    def bits_per_byte(self, nats_per_token: float) -> float:
        return nats_per_token * self.tokens / math.log(2) / self.text_bytes

    def __str__(self) -> str:
        rows = [f"held out: {self.tokens} tokens, {self.text_bytes} bytes of UTF-8"]
        for name, loss in (("model", self.model), ("unigram", self.unigram)):
            rows.append(f"{name:8} {loss:.4f} nats per token, {self.bits_per_byte(loss):.4f} bits per byte")
        return "\n".join(rows)


def token_stream(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents as one int64 tensor [N]: an end token, then each document and its end token."""
    end = tokenizer.eos_token_id
    ids = [end]
    for encoded in tokenizer([document.text for document in documents], verbose=False)["input_ids"]:
        ids += [*encoded, end]
    return torch.tensor(ids)


@torch.no_grad()
def model_loss(model: PreTrainedModel, stream: torch.Tensor) -> float:
    """Mean nats per token of ``stream`` [N] but its first, predicted in windows that share no target."""
    total = 0.0
    for start in range(0, len(stream) - 1, WINDOW_TOKENS):
        window = stream[start : start + WINDOW_TOKENS + 1]
        logits = model(window[None, :-1]).logits[0]
        total += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(stream) - 1)


def unigram_loss(training: torch.Tensor, held_out: torch.Tensor, *, vocab: int) -> float:
    """Mean nats per token of ``held_out`` [N] but its first, under add-one counts of ``training`` [M]."""
    counts = torch.bincount(training, minlength=vocab).double() + 1
    return -(counts / counts.sum()).log()[held_out[1:]].mean().item()


def evaluate(folder: Path) -> Figures:
    """Loads the model in ``folder`` and evaluates it in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    training, held_out = split()
    stream = token_stream(held_out, tokenizer)
    return Figures(
        model=model_loss(model, stream),
        unigram=unigram_loss(token_stream(training, tokenizer), stream, vocab=model.config.vocab_size),
        tokens=len(stream) - 1,
        text_bytes=sum(len(document.text.encode()) for document in held_out),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss of a saved demo model.")
    parser.add_argument("folder", type=Path)
    print(evaluate(parser.parse_args().folder))


if __name__ == "__main__":
    main()
