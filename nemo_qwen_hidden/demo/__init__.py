"""A small trained Qwen2 and a text to run it on, shipped with the package; `recipes/demo_model` made both."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_folder() -> Path:
    """A Hugging Face folder: config.json, model.safetensors (bfloat16), tokenizer.json, and a card, README.md."""
    return _HERE / "model"


def text_path() -> Path:
    """JSON lines of 24 documents, each ``{"id": str, "text": str}``, of about 10 to 900 tokens."""
    return _HERE / "text.jsonl"
