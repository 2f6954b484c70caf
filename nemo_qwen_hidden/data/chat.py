"""A chat as one text, and which characters of it the assistant is to say.

Where the model's chat template marks them by ``{% generation %}``, it is asked. Where it does not, as Qwen2.5's, a turn
of the assistant is what rendering the messages up to it adds to rendering those before it with the prompt for the next
turn: what the model generates, then, its end token included. White space that the template puts after that token is not
part of it, since nobody generates it.
"""

from nemo_qwen_hidden.data.chat_record import ASSISTANT
from nemo_qwen_hidden.data.document import DATA_PATH, Document
from nemo_qwen_hidden.data.tokenizer import Spans, TemplateError, Tokenizer
from nemo_qwen_hidden.errors import DataError


def render(document: Document, tokenizer: Tokenizer, *, assistant: bool) -> tuple[str, Spans | None]:
    """The text of a document's messages; where ``assistant``, also the spans that the assistant says, else None.

    Raises:
        CheckpointError: the model has no chat template. DataError: it refuses the messages, or without marks of its own
            renders them in such a way that the assistant's turns cannot be told.
    """
    try:
        if not assistant:
            return tokenizer.render(_messages(document), prompt=False), None
        if tokenizer.marks_generation:
            return tokenizer.render_generation(_messages(document))
        text = tokenizer.render(_messages(document), prompt=False)
        return text, _turns(document, text, tokenizer)
    except TemplateError as error:
        raise _refused(document, "must hold messages that the model's chat template takes", str(error)) from error


def _turns(document: Document, text: str, tokenizer: Tokenizer) -> Spans:
    messages, spans = _messages(document), []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        if number == 0:
            rule = "must hold chats that begin with another role than the assistant, for `tokens.keep=assistant`"
            raise _refused(document, rule, "message 0")
        before = tokenizer.render(messages[:number], prompt=True)
        after = tokenizer.render(messages[: number + 1], prompt=False)
        if not (text.startswith(after) and after.startswith(before)):
            rule = (
                "must hold messages that the chat template renders alike whatever follows, for `tokens.keep=assistant`"
            )
            ways = "a template with {% generation %} marks, or `tokens.keep=mask` over token ids, does without"
            raise _refused(document, rule, f"{ways}; message {number}")
        spans.append((len(before), _end(after, len(before), tokenizer)))
    return spans


def _end(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Where a turn that began at ``start`` ends: with its end token, if only white space follows that."""
    stop = len(text.rstrip())
    ends = any(text.endswith(token, start, stop) for token in tokenizer.special_tokens)
    return stop if ends else len(text)


def _messages(document: Document) -> list[dict[str, object]]:
    return [dict(message) for message in document.messages or ()]


def _refused(document: Document, rule: str, what: str) -> DataError:
    return DataError(DATA_PATH, f"{rule} ({what}; document {document.id!r})", document.source)
