"""Masks of records: of each token, or of spans of characters, mapped through the tokenizer's offsets."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.sources import check_path, read_documents
from nemo_qwen_hidden.data.tokenize import overlapping, tokenize
from nemo_qwen_hidden.data.tokenizer import load_tokenizer
from nemo_qwen_hidden.errors import DataError

AutoTokenizer: Any = transformers.AutoTokenizer

TEXTS = [
    "the quick brown fox jumps",
    "e\u0301 漢字 👩‍👩‍👧 naïve \u1112\u1161\u11ab<|im_end|>x",
    "  leading\r\n\ttabs",
]
RECORDS: list[dict[str, Any]] = [
    {"id": "a", "token_ids": [5, 6, 7], "keep": [0, 1, 1]},
    {"id": "b", "token_ids": [5, 6], "keep": [True, False]},
    {"id": "c", "token_ids": [], "keep": []},
    {"id": "d", "text": TEXTS[0], "keep": [[0, 3], [10, 11]]},
    {"id": "e", "text": TEXTS[0], "keep": []},
]


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=9),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=4),
)
def test_a_token_is_kept_if_it_shares_a_character_with_a_span(
    tokens: list[tuple[int, int]], spans: list[tuple[int, int]]
) -> None:
    offsets = [(start, start + size) for start, size in tokens]
    ends = [(start, start + size) for start, size in spans]
    inside = {character for start, stop in ends for character in range(start, stop)}
    assert overlapping(offsets, ends).tolist() == [bool(inside & set(range(*offset))) for offset in offsets]


@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_mapped_through_the_tokenizers_offsets(model_folder: Path, text: str) -> None:
    """Against ``char_to_token`` of transformers: the tokens of single characters are those that keeping these keeps."""
    theirs = AutoTokenizer.from_pretrained(model_folder)(text, verbose=False)
    for character in range(len(text)):
        document = Document(id="x", source="s", text=text, spans=[(character, character + 1)])
        (found,) = tokenize([document], lambda: load_tokenizer(model_folder), vocab_size=384)
        assert found.mask is not None and found.token_ids.tolist() == theirs["input_ids"]
        token = theirs.char_to_token(character)
        if token is None:  # composed away by NFC
            assert not found.mask.any()
        else:
            start, stop = theirs.token_to_chars(token)
            alike = [n for n in range(len(found.mask)) if tuple(theirs.token_to_chars(n)) == (start, stop)]
            assert found.mask[alike].all()  # a character may be several tokens
            assert all(
                theirs.token_to_chars(n).start <= character < theirs.token_to_chars(n).end
                for n in np.flatnonzero(found.mask)
            )


def test_without_spans_the_same_ids_and_no_mask(model_folder: Path) -> None:
    documents = [
        Document(id="a", source="s", text=TEXTS[1]),
        Document(id="b", source="s", text=TEXTS[1], spans=[]),
        Document(id="c", source="s", text=TEXTS[1], spans=[(0, len(TEXTS[1]))]),
    ]
    plain, none, whole = tokenize(documents, lambda: load_tokenizer(model_folder), vocab_size=384)
    assert plain.token_ids.tolist() == none.token_ids.tolist() == whole.token_ids.tolist()
    assert plain.mask is None
    assert none.mask is not None and not none.mask.any()
    assert whole.mask is not None and whole.mask.all()


def test_records_of_lines(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    check_path(str(path), mask_field="keep")
    documents = list(read_documents(str(path), mask_field="keep"))
    assert [document.mask for document in documents] == [[False, True, True], [True, False], [], None, None]
    assert [document.spans for document in documents] == [None, None, None, [(0, 3), (10, 11)], []]
    masks = [found.mask for found in tokenize(documents, lambda: load_tokenizer(model_folder), vocab_size=384)]
    assert all(mask is not None and mask.dtype == np.bool_ for mask in masks)
    assert [mask.tolist() for mask in masks[:3] if mask is not None] == [[False, True, True], [True, False], []]
    without = list(read_documents(str(path)))
    assert all(document.mask is None and document.spans is None for document in without)


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8()])
def test_columns(tmp_path: Path, kind: pa.DataType) -> None:
    ids = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
    table = pa.table({"token_ids": ids, "keep": pa.array([[True, False], [True]]).cast(pa.list_(kind))})
    pq.write_table(table, tmp_path / "ids.parquet")
    found = read_documents(str(tmp_path / "ids.parquet"), mask_field="keep")
    assert [document.mask for document in found] == [[True, False], [True]]
    pq.write_table(pa.table({"text": ["abc"], "keep": [[[0, 2]]]}), tmp_path / "text.parquet")
    (document,) = read_documents(str(tmp_path / "text.parquet"), mask_field="keep")
    assert document.spans == [(0, 2)]
    with pytest.raises(DataError, match="must have a column `other`, the mask"):
        list(read_documents(str(tmp_path / "text.parquet"), mask_field="other"))


ONE = "must hold 0 or 1 for each token in `keep` (line 1 of PATH "
WITHIN = "must hold a list of [start, stop] within the text in `keep` (line 1 of PATH "


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"token_ids": [1]}, f"{ONE}has none)"),
        ({"token_ids": [1], "keep": None}, f"{ONE}has none)"),
        ({"token_ids": [1], "keep": 1}, f"{ONE}has int)"),
        ({"token_ids": [1], "keep": [1, 0]}, f"{ONE}has 2 for 1 tokens)"),
        ({"token_ids": [1, 2], "keep": [1, 2]}, f"{ONE}has 2 at position 1)"),
        ({"token_ids": [1, 2], "keep": [0.0, 1]}, f"{ONE}has 0.0 at position 0)"),
        ({"token_ids": [1, 2], "keep": [[0, 1], None]}, f"{ONE}has [0, 1] at position 0)"),
        ({"text": "abc"}, f"{WITHIN}has none)"),
        ({"text": "abc", "keep": "0:2"}, f"{WITHIN}has str)"),
        ({"text": "abc", "keep": [0, 1, 1]}, f"{WITHIN}has 0 and 3 characters)"),
        ({"text": "abc", "keep": [[0, 4]]}, f"{WITHIN}has [0, 4] and 3 characters)"),
        ({"text": "abc", "keep": [[2, 1]]}, f"{WITHIN}has [2, 1] and 3 characters)"),
        ({"text": "abc", "keep": [[-1, 2]]}, f"{WITHIN}has [-1, 2] and 3 characters)"),
        ({"text": "abc", "keep": [[True, 2]]}, f"{WITHIN}has [True, 2] and 3 characters)"),
        ({"text": "abc", "keep": [[0, 1, 2]]}, f"{WITHIN}has [0, 1, 2] and 3 characters)"),
        (
            {"messages": [{"role": "user", "content": "a"}], "keep": [1]},
            "must hold text or token ids for the mask in `keep` (line 1 of PATH has messages, of which "
            "`tokens.keep=assistant` makes a mask)",
        ),
    ],
)
def test_bad_masks(tmp_path: Path, record: dict[str, Any], what: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=re.escape(what.replace("PATH", f"'{path}'"))):
        list(read_documents(str(path), mask_field="keep"))


def test_files_of_text_have_no_mask(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match="must be JSONL or Parquet, for the mask in `keep`"):
        check_path(str(tmp_path), mask_field="keep")


def test_the_field_has_a_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    for name in ("text", "token_ids", "messages", "id"):
        with pytest.raises(DataError, match="must name a field other than") as caught:
            read_documents(str(tmp_path), mask_field=name)
        assert caught.value.setting == "tokens.mask_field"


@pytest.mark.parametrize(
    "values",
    [
        {"text": "a", "mask": [True]},
        {"token_ids": [1, 2], "mask": [True]},
        {"token_ids": [1], "spans": [(0, 1)]},
        {"messages": [{"role": "user", "content": "a"}], "spans": [(0, 1)]},
    ],
)
def test_a_mask_belongs_to_what_it_marks(values: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"must give (a mask with token_ids|spans with text) alone"):
        Document(id="a", source="s", **values)
