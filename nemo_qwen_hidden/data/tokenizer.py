"""The model's own tokenizer, through transformers, which is imported only when one is loaded."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_qwen_hidden.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILES = "tokenizer.json, or vocab.json and merges.txt"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that it gives; a model's own ``vocab_size`` is often padded beyond it."""

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, over everything that decides which ids a text gets."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, whole: no padding, no truncation, and only the special tokens the model adds."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""


def load_tokenizer(model_folder: Path) -> Tokenizer:
    """The tokenizer in a Hugging Face model folder, from local files only.

    Raises:
        CheckpointError: there is none, it cannot be read, or it has no fast form. Names ``model.path``.
    """
    _check_files(model_folder)
    from transformers import AutoTokenizer

    try:
        # fix_mistral_regex: asked for neither way, transformers 4.57.3 to 4.57.6 warn that every tokenizer of more than
        # 100 000 tokens saved by those releases, Qwen's among them, has Mistral's wrong pattern
        # (PreTrainedTokenizerBase._patch_mistral_regex).
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_folder), local_files_only=True, use_fast=True, trust_remote_code=False, fix_mistral_regex=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        rule = f"must hold a tokenizer that transformers can load ({reason})"
        raise CheckpointError("model.path", rule, str(model_folder)) from error
    if not tokenizer.is_fast:
        rule = f"must hold a fast tokenizer ({_FILES}; {type(tokenizer).__name__} is a slow one)"
        raise CheckpointError("model.path", rule, str(model_folder))
    return _FastTokenizer(tokenizer)


class _FastTokenizer:
    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        # What transformers does at the first call; done here, the fingerprint is the same before and after it.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._tokenizer = tokenizer

    @cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: long documents are cut into windows later, so the warning about their length is wrong here.
        encoded = self._tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text


def _check_files(folder: Path) -> None:
    whole = folder / "tokenizer.json"
    if whole.is_file():
        try:
            # The tokenizers library raises a bare Exception for what is not JSON, such as a Git LFS pointer.
            json.loads(whole.read_bytes())
        except (OSError, ValueError) as error:
            rule = f"must hold a tokenizer.json that can be read ({' '.join(str(error).split())})"
            raise CheckpointError("model.path", rule, str(folder)) from error
    elif not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        rule = f"must hold a tokenizer ({_FILES}; data with `token_ids` needs none)"
        raise CheckpointError("model.path", rule, str(folder))
