"""The chat template that Qwen2.5 ships: its assistant's tokens by prefixes, against transformers on the same template
with ``{% generation %}`` written into it.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from nemo_qwen_hidden.data.document import Document
from nemo_qwen_hidden.data.tokenize import tokenize
from nemo_qwen_hidden.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.real

TURN = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
SAID = "message.content + '<|im_end|>' }}"
MARKED_TURN = (
    "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}"
    f"{{%- generation %}}{{{{- {SAID}{{%- endgeneration %}}{{%- else %}}{{{{- {SAID}{{%- endif %}}{{{{- '\\n' }}}}"
)
CHATS = [
    [("user", "def f(x):\n    return"), ("assistant", " x + 1\n\n"), ("user", "Why?"), ("assistant", "Because.")],
    [("system", "Short."), ("user", "漢字 naïve"), ("assistant", "你好世界 👩‍👩‍👧")],
    [("user", "a"), ("assistant", "b"), ("tool", "7"), ("assistant", "  indented")],
]


def test_prefixes_give_the_mask_that_marks_would(tmp_path: Path) -> None:
    folder = Path(os.environ["NQH_REAL_MODEL"])
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in names:
        shutil.copy(folder / name, tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    assert template.count(TURN) == 1
    (tmp_path / "chat_template.jinja").write_text(template.replace(TURN, MARKED_TURN))
    tokenizer: Any = transformers.AutoTokenizer
    theirs = tokenizer.from_pretrained(tmp_path, local_files_only=True, fix_mistral_regex=False)
    chats = [[{"role": role, "content": content} for role, content in turns] for turns in CHATS]
    documents = [Document(id=str(number), source="s", messages=chat) for number, chat in enumerate(chats)]
    found = tokenize(documents, lambda: load_tokenizer(folder), vocab_size=151_936, assistant=True)
    assert not load_tokenizer(folder).marks_generation
    for document, chat in zip(found, chats, strict=True):
        expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert document.token_ids.tolist() == expected["input_ids"]
        assert document.mask is not None
        assert document.mask.tolist() == [bool(flag) for flag in expected["assistant_masks"]]
        assert document.mask.any()
