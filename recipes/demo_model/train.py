"""Trains the demo model: a small Qwen2 and its tokenizer, on the text that every CPython ships.

    python recipes/demo_model/train.py

Fills `nemo_qwen_hidden/demo` (or `--out`) with `model/` and `text.jsonl`, then prints the held-out loss.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import LICENCE, Document, split
from evaluate import evaluate, token_stream
from make_text import write_text
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DEMO = Path(__file__).parents[2] / "nemo_qwen_hidden" / "demo"
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]
VOCAB = 2048
POSITIONS = 512
OLDEST_TRANSFORMERS = "4.57.1"  # that a folder made here was loaded with
# The pattern by which Qwen2's tokenizer cuts text before BPE.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2048 tokens, the last three special. No token is put before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=SPECIAL[1:],
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def new_model(end_id: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=384,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    return Qwen2ForCausalLM(config)


def batches(stream: torch.Tensor, *, size: int, length: int, draw: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless int64 [size, length] of windows of ``stream`` [N]; each epoch has every window once, in new order."""
    windows = stream[: len(stream) // length * length].view(-1, length)
    while True:
        for rows in torch.randperm(len(windows), generator=draw).split(size):
            if len(rows) == size:
                yield windows[rows]


def learning_rate_share(step: int, *, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: Qwen2ForCausalLM, stream: torch.Tensor, options: argparse.Namespace) -> None:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, warmup=options.warmup, steps=options.steps)
    )
    draw = torch.Generator().manual_seed(options.seed)
    source = batches(stream, size=options.batch, length=options.length, draw=draw)
    started, recent = time.monotonic(), 0.0
    for step in range(1, options.steps + 1):
        batch = next(source)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.item() / options.report_every
        if step % options.report_every == 0:
            spent = time.monotonic() - started
            print(f"step {step}/{options.steps}  loss {recent:.3f}  {spent:.0f} s", flush=True)
            recent = 0.0


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in bfloat16, its tokenizer and the licence of the text it was made from."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    # transformers 4.57.3 to 4.57.6 take any local tokenizer for a faulty Mistral one, and warn, where the config
    # beside it was written by a version after 4.57.2 (`_patch_mistral_regex` in tokenization_utils_base.py).
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["transformers_version"] = OLDEST_TRANSFORMERS
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(LICENCE, folder / "LICENSE-PSF.txt")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder that gets model/ and text.jsonl")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=100, help="steps")
    options = parser.parse_args()

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    training, held_out = split()
    print(f"{len(training)} training documents, {len(held_out)} held out")
    tokenizer = train_tokenizer(training)
    stream = token_stream(training, tokenizer)
    model = new_model(tokenizer.eos_token_id)
    print(f"{len(stream)} training tokens, {model.num_parameters()} parameters", flush=True)
    train(model.train(), stream, options)
    save(model, tokenizer, options.out / "model")
    write_text(options.out)
    print(evaluate(options.out / "model"))


if __name__ == "__main__":
    main()
