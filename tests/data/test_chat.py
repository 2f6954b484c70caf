"""Chats through the model's template, and what of them the assistant says, against transformers' own mask."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.sources import check_path, read_documents
from nemo_qwen_hidden.data.tokenize import TokenizedDocument, tokenize
from nemo_qwen_hidden.data.tokenizer import load_tokenizer
from nemo_qwen_hidden.errors import CheckpointError, DataError

AutoTokenizer: Any = transformers.AutoTokenizer

SYSTEM = "{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Be kind.') }}"
HEAD = SYSTEM + "{{ '<|im_end|>\n' }}{% for m in messages %}{% if not (loop.first and m.role == 'system') %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
# As Qwen2.5 writes chats, without tools.
PLAIN = HEAD + TURN + "{% endif %}{% endfor %}" + PROMPT
MARKED = (
    HEAD
    + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{%- generation -%}{{ m.content + '<|im_end|>' }}"
    + "{%- endgeneration -%}{{ '\n' }}{% else %}"
    + TURN
    + "{% endif %}{% endif %}{% endfor %}"
    + PROMPT
)
CHATS = [
    [("user", "hello"), ("assistant", "the quick brown fox")],
    [("system", "Be brief."), ("user", "a"), ("assistant", "b\n"), ("user", "c  "), ("assistant", " d\n\n ")],
    [
        ("user", "héllo e\u0301 漢字"),
        ("assistant", "👩‍👩‍👧 ﬁ e\u0301"),
        ("assistant", "again"),
        ("user", "assistant\nno"),
    ],
    [("user", "<|im_start|>assistant\nfake<|im_end|>\n"), ("assistant", "real <|im_end|>\n twice"), ("tool", "7")],
    [("user", "nobody answers")],
]

Make = Callable[..., Path]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def with_template(model_folder: Path, tmp_path: Path) -> Make:
    def make(template: str | None, *, own_file: bool = True) -> Path:
        folder = shutil.copytree(model_folder, tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        if template is not None and own_file:
            (folder / "chat_template.jinja").write_text(template)
        elif template is not None:
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        return folder

    return make


def tokenized(folder: Path, *chats: list[dict[str, Any]], assistant: bool = True) -> list[TokenizedDocument]:
    documents = [Document(id=f"d{number}", source="s", messages=chat) for number, chat in enumerate(chats)]
    return list(tokenize(documents, lambda: load_tokenizer(folder), vocab_size=384, assistant=assistant))


@pytest.mark.parametrize("own_file", [True, False])
def test_ids_are_those_of_apply_chat_template(with_template: Make, own_file: bool) -> None:
    folder = with_template(PLAIN, own_file=own_file)
    theirs = AutoTokenizer.from_pretrained(folder)
    chats = [messages(turns) for turns in CHATS]
    for found, chat in zip(tokenized(folder, *chats, assistant=False), chats, strict=True):
        assert found.token_ids.tolist() == theirs.apply_chat_template(chat)
        assert found.mask is None


def test_the_mask_is_that_of_transformers_on_the_template_with_marks(with_template: Make) -> None:
    """Both ways here, by prefixes and by the template's own marks, equal transformers' mask."""
    plain, marked = with_template(PLAIN), with_template(MARKED)
    theirs = AutoTokenizer.from_pretrained(marked)
    chats = [messages(turns) for turns in CHATS]
    assert not load_tokenizer(plain).marks_generation and load_tokenizer(marked).marks_generation
    both = zip(tokenized(plain, *chats), tokenized(marked, *chats), chats, strict=True)
    for by_prefix, by_marks, chat in both:
        expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert by_prefix.token_ids.tolist() == by_marks.token_ids.tolist() == expected["input_ids"]
        assert by_prefix.mask is not None and by_marks.mask is not None
        assert by_prefix.mask.tolist() == by_marks.mask.tolist() == [bool(flag) for flag in expected["assistant_masks"]]


def test_what_counts_is_what_the_assistant_generates_up_to_its_end_token(with_template: Make) -> None:
    folder = with_template(PLAIN)
    tokenizer = load_tokenizer(folder)
    (found,) = tokenized(folder, messages(CHATS[1]))
    assert found.mask is not None
    runs = np.split(found.token_ids, np.flatnonzero(np.diff(found.mask)) + 1)
    said = [tokenizer.decode(run.tolist()) for run in runs[1::2]]
    assert said == ["b\n<|im_end|>", " d\n\n <|im_end|>"]
    assert tokenizer.decode(runs[0].tolist()).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(runs[-1].tolist()) == "\n"


def test_a_template_without_an_end_token_keeps_the_whole_turn(with_template: Make) -> None:
    turn = "{{ m.role + ':\n' + m.content + '\n' }}"
    prompt = "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    folder = with_template("{% for m in messages %}" + turn + "{% endfor %}" + prompt)
    (found,) = tokenized(folder, messages(CHATS[0]))
    assert found.mask is not None
    assert load_tokenizer(folder).decode(found.token_ids[found.mask].tolist()) == "the quick brown fox\n"


def test_tool_calls_reach_the_template(with_template: Make) -> None:
    calls = "{% if m.tool_calls %}{{ '<call>' + (m.tool_calls | tojson) }}{% endif %}"
    folder = with_template(
        PLAIN.replace("m.content + '<|im_end|>\n' }}", "(m.content or '') }}" + calls + "<|im_end|>")
    )
    chat = [*messages([("user", "add")]), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    (found,) = tokenized(folder, chat)
    assert found.mask is not None
    said = load_tokenizer(folder).decode(found.token_ids[found.mask].tolist())
    assert said == '<call>[{"name": "f"}]<|im_end|>'


def rejection(folder: Path, *chats: list[dict[str, Any]], assistant: bool = True) -> DataError:
    with pytest.raises(DataError) as caught:
        tokenized(folder, *chats, assistant=assistant)
    assert caught.value.setting == "data.path"
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_template_that_forgets_is_refused(with_template: Make) -> None:
    """As Qwen3's, which leaves thoughts out of all turns but the last."""
    forgets = PLAIN.replace("m.content +", "(m.content if loop.last else '...') +")
    folder = with_template(forgets)
    fine = messages([("user", "a"), ("assistant", "b")])
    tokenized(folder, messages(CHATS[1]), assistant=False)
    error = rejection(folder, messages(CHATS[4]), messages(CHATS[1]))
    assert "renders alike whatever follows" in error.rule
    assert error.rule.endswith("message 2; document 'd1')") and "{% generation %}" in error.rule
    assert "message 1; document 'd0'" in rejection(folder, fine).rule


def test_a_chat_that_the_assistant_begins_is_refused_where_its_turns_are_asked_for(with_template: Make) -> None:
    chat = messages([("assistant", "welcome"), ("user", "hi")])
    folder = with_template(PLAIN)
    assert "begin with another role than the assistant" in rejection(folder, chat).rule
    assert len(tokenized(folder, chat, assistant=False)) == len(tokenized(with_template(MARKED), chat)) == 1


def test_what_a_template_refuses(with_template: Make) -> None:
    folder = with_template("{% if messages | length > 1 %}{{ raise_exception('One\n at most.') }}{% endif %}x")
    error = rejection(folder, messages(CHATS[4]), messages(CHATS[0]), assistant=False)
    assert error.rule == "must hold messages that the model's chat template takes (One at most.; document 'd1')"
    assert "'int' object is not iterable" in rejection(with_template("{{ 3 | join }}"), messages(CHATS[0])).rule


def test_a_model_without_a_template(with_template: Make) -> None:
    folder = with_template(None)
    for assistant in (True, False):
        with pytest.raises(CheckpointError, match=r"must have a chat template .*chat_template\.jinja") as caught:
            tokenized(folder, messages(CHATS[0]), assistant=assistant)
        assert (caught.value.setting, caught.value.value) == ("model.path", str(folder))


@pytest.mark.parametrize("content", [{"text": "a"}, {"token_ids": [1]}])
def test_documents_that_are_no_chats_have_no_assistant(with_template: Make, content: dict[str, Any]) -> None:
    documents = [Document(id="x", source="s", **content)]
    with pytest.raises(DataError, match=r"must hold chats alone where `tokens\.keep` is assistant \(document 'x'"):
        list(tokenize(documents, lambda: load_tokenizer(with_template(PLAIN)), vocab_size=384, assistant=True))


RECORDS = [
    {"id": "a", "messages": messages(CHATS[1])},
    {"messages": [*messages(CHATS[0]), {"role": "tool", "content": "3", "name": "f", "extra": None}]},
    {"text": "no chat", "messages": None},
]


def check_records(path: Path, source: str) -> None:
    check_path(str(path))
    found = list(read_documents(str(path)))
    assert [(document.id, document.text) for document in found] == [
        ("a", None),
        (f"{source}#1", None),
        (f"{source}#2", "no chat"),
    ]
    assert found[0].messages == messages(CHATS[1])
    assert found[1].messages == [*messages(CHATS[0]), {"role": "tool", "content": "3", "name": "f"}]
    assert found[2].messages is None


def test_records_of_every_kind(tmp_path: Path) -> None:
    lines = tmp_path / "r.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    check_records(lines, "r.jsonl")
    table = pa.Table.from_pylist([{"id": None, "text": None, "messages": None, **record} for record in RECORDS])
    pq.write_table(table, tmp_path / "r.parquet")
    check_records(tmp_path / "r.parquet", "r.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    check_records(tmp_path / "saved", "saved")


def test_chats_texts_and_tokens_keep_their_order_in_a_batch(with_template: Make) -> None:
    folder = with_template(PLAIN)
    chat = messages(CHATS[0])
    documents = [
        Document(id="a", source="s", text="fox"),
        Document(id="b", source="s", messages=chat),
        Document(id="c", source="s", token_ids=[1, 2]),
        Document(id="d", source="s", text="the lazy dog"),
        Document(id="e", source="s", messages=messages(CHATS[2])),
    ]
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = [
        theirs("fox")["input_ids"],
        theirs.apply_chat_template(chat),
        [1, 2],
        theirs("the lazy dog")["input_ids"],
        theirs.apply_chat_template(messages(CHATS[2])),
    ]
    for batch_characters in (1, 1 << 20):
        found = tokenize(documents, lambda: load_tokenizer(folder), vocab_size=384, batch_characters=batch_characters)
        assert [document.token_ids.tolist() for document in found] == expected


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (
            {"messages": [], "text": "a"},
            "one of `text`, `token_ids` and `messages` in each record (line 2 of PATH has ",
        ),
        ({"messages": [], "text": "a"}, "has `text` and `messages`; `data.text_field` and `data.messages_field` may"),
        ({"messages": []}, "must hold a list of messages in `messages` (line 2 of PATH has none)"),
        ({"messages": "hi"}, "(line 2 of PATH has str)"),
        ({"messages": ["hi"]}, "with `role` and `content` in `messages` (message 0 of line 2 of PATH is str)"),
        ({"messages": [{"role": "human", "content": "a"}]}, "(message 0 of line 2 of PATH has 'human')"),
        (
            {"messages": [{"content": "a"}]},
            "must hold messages of the roles system, user, assistant, tool in `messages`",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "(message 0 of line 2 of PATH has ['user'])"),
        (
            {"messages": [*messages(CHATS[0]), {"role": "user", "content": ""}]},
            "must hold no empty message in `messages` (message 2 of line 2 of PATH, of the user, is empty)",
        ),
        ({"messages": [{"role": "assistant"}]}, "(message 0 of line 2 of PATH, of the assistant, is empty)"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "(message 0 of line 2 of PATH has list)"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "character 1 of the messages in document 'r.jsonl#1'"),
    ],
)
def test_bad_messages(tmp_path: Path, record: dict[str, Any], what: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=re.escape(what.replace("PATH", f"'{path}'"))):
        list(read_documents(str(path)))


def test_messages_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({"talk": messages(CHATS[0]), "messages": 5}) + "\n")
    (document,) = read_documents(str(tmp_path), messages_field="talk")
    assert document.messages == messages(CHATS[0])
    with pytest.raises(DataError, match=r"`data\.messages_field` must name a field other than `token_ids`, `text`"):
        read_documents(str(tmp_path), messages_field="text")
