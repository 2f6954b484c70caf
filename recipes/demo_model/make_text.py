"""Writes the small text that examples and tests run on: passages of held-out documents, of very unequal lengths.

    python recipes/demo_model/make_text.py nemo_qwen_hidden/demo

The folder holds `model/`, whose tokenizer measures the passages, and gets `text.jsonl`: one {"id", "text"} a line.
"""

import argparse
import json
import random
from pathlib import Path

from corpus import Document, split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PASSAGES = 24
SHORTEST_TOKENS, LONGEST_TOKENS = 10, 900


def wanted_lengths() -> list[int]:
    """Token counts from the shortest to the longest, more of them small."""
    steps = [(i / (PASSAGES - 1)) ** 1.5 for i in range(PASSAGES)]
    return [round(SHORTEST_TOKENS + step * (LONGEST_TOKENS - SHORTEST_TOKENS)) for step in steps]


def paragraph_starts(lines: list[str]) -> list[int]:
    """Numbers, 0-based, of the unindented lines that follow a blank line or begin the document."""
    return [i for i, line in enumerate(lines) if line[:1].strip() and (i == 0 or not lines[i - 1].strip())]


def passage(document: Document, *, start: int, wanted_tokens: int, tokenizer: PreTrainedTokenizerFast) -> range | None:
    """Lines from ``start`` on, the fewest with ``wanted_tokens``; None where the document ends before that."""
    lines = document.text.splitlines()
    for end in range(start + 1, len(lines) + 1):
        if len(tokenizer("\n".join(lines[start:end]), verbose=False)["input_ids"]) >= wanted_tokens:
            return range(start, end)
    return None


def passages(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    """One passage of each wanted length, in mixed order, spread over ``documents``, none sharing a line with another.

    Their names carry line numbers, 1-based and inclusive.
    """
    draw = random.Random(0)
    taken: dict[str, set[int]] = {document.name: set() for document in documents}
    chosen: list[Document] = []
    for wanted_tokens in sorted(wanted_lengths(), reverse=True):
        starts = [(document, start) for document in documents for start in paragraph_starts(document.text.splitlines())]
        draw.shuffle(starts)
        for document, start in sorted(starts, key=lambda pair: len(taken[pair[0].name])):
            lines = passage(document, start=start, wanted_tokens=wanted_tokens, tokenizer=tokenizer)
            if lines and taken[document.name].isdisjoint(lines):
                taken[document.name].update(lines)
                text = "\n".join(document.text.splitlines()[lines.start : lines.stop])
                chosen.append(Document(f"{document.name}:{lines.start + 1}-{lines.stop}", text))
                break
    draw.shuffle(chosen)
    return chosen


def write_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    _, held_out = split()
    chosen = passages(held_out, tokenizer)
    lines = [json.dumps({"id": each.name, "text": each.text}, ensure_ascii=False) for each in chosen]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lengths = [len(tokenizer(each.text, verbose=False)["input_ids"]) for each in chosen]
    print(f"text.jsonl: {len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes text.jsonl beside a saved demo model.")
    parser.add_argument("folder", type=Path)
    write_text(parser.parse_args().folder)


if __name__ == "__main__":
    main()
