"""The model's own tokenizer gives what transformers gives."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from nemo_qwen_hidden.data.tokenizer import load_tokenizer
from nemo_qwen_hidden.errors import CheckpointError

AutoTokenizer: Any = transformers.AutoTokenizer

ODD = [
    "",
    " ",
    "the quick brown fox",
    "  leading, trailing  ",
    "\r\n\t\x0b\x00\x7f",
    "e\u0301 and \u00e9, \u1112\u1161\u11ab",
    "👩‍👩‍👧‍👦 🇩🇪 \U0001f3f4\U000e0067",
    "العربية עברית हिन्दी 漢字 ไทย",
    "\u200b\u200d\ufeff\u2028\u2029\u202e\uffff\ufffd",
    "<|endoftext|>a<|im_start|> <|im_end|",
    "zalgo" + "\u0301\u0323" * 50,
    "0123456789 " * 500,
]


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What transformers tells the terminal; its logger does not propagate, so caplog does not see it."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep()
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


def rejection(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert caught.value.setting == "model.path"
    assert caught.value.value == str(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def test_ids_are_those_of_transformers_on_odd_strings(model_folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    ours = load_tokenizer(model_folder)
    assert ours.encode_batch(ODD) == [theirs(text, verbose=False)["input_ids"] for text in ODD]
    assert ours.encode_batch([]) == []
    assert ours.encode_batch([""]) == [[]]


def test_decode_gives_the_text_back(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    for text in ("fox . <|endoftext|> , n't", "👩‍👩‍👧‍👦 漢字\r\n\x00", ""):
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_long_text_is_whole_and_without_a_warning(model_folder: Path, logged: list[str]) -> None:
    tokenizer = load_tokenizer(model_folder)
    assert len(tokenizer.encode_batch(["z" * 5000])[0]) == 5000
    assert logged == []
    AutoTokenizer.from_pretrained(model_folder)("z" * 5000)
    assert any("longer than the specified maximum" in message for message in logged)


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied(model_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=4)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer, plain = load_tokenizer(tmp_path), load_tokenizer(model_folder)
    before = tokenizer.fingerprint
    assert tokenizer.encode_batch(["z", "z" * 9]) == plain.encode_batch(["z", "z" * 9])
    assert before == plain.fingerprint == load_tokenizer(tmp_path).fingerprint


def test_fingerprint_follows_what_decides_the_ids(model_folder: Path, tmp_path: Path) -> None:
    original = load_tokenizer(model_folder).fingerprint
    assert len(original) == 64
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert load_tokenizer(moved).fingerprint == original
    content = json.loads((moved / "tokenizer.json").read_text())
    content["normalizer"] = None
    (moved / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(moved).fingerprint != original


def test_vocab_size_is_one_more_than_the_highest_id(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokenizer.vocab_size == max(vocabulary.values()) + 1
    assert isinstance(tokenizer.decode([tokenizer.vocab_size - 1]), str)


@pytest.mark.parametrize("release", ["4.40.1", "4.57.6"])
def test_large_vocabulary_brings_no_false_warning(
    model_folder: Path, tmp_path: Path, logged: list[str], release: str
) -> None:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary.update({f"<{number}>": number for number in range(len(vocabulary), 100_500)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "transformers_version": release}))
    assert load_tokenizer(tmp_path).encode_batch(ODD) == load_tokenizer(model_folder).encode_batch(ODD)
    assert logged == []


def test_vocab_and_merges_without_tokenizer_json(model_folder: Path, tmp_path: Path) -> None:
    model = json.loads((model_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode_batch(ODD) == [theirs(text, verbose=False)["input_ids"] for text in ODD]


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "must hold a tokenizer (tokenizer.json, or vocab.json and merges.txt" in rejection(folder).rule
        assert "data with `token_ids` needs none" in rejection(folder).rule


def test_unreadable_tokenizer_files(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuchTokenizer"}))
    assert "that transformers can load" in rejection(tmp_path).rule
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "must hold a tokenizer.json that can be read" in rejection(tmp_path).rule
