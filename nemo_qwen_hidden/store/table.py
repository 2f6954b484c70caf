"""The two files of a part's token table: their names, and what the first has columns of."""

from nemo_qwen_hidden.store.format import TOKENS

TOKEN_BYTES = 12  # of each row
COLUMNS = ("token_id", "document", "position")
FIRST_ROW = "document_first_row"
KEPT = "kept"  # of a table some of whose rows alone have states
KEPT_BYTES = 8  # of each of those
WEIGHT = "weight"  # of each row in the mean of its document, of a table whose documents' states are means


def table_name(part: int) -> str:
    """File of the token table of part number ``part``."""
    return f"{TOKENS}/{part:06d}.safetensors"


def lines_name(part: int) -> str:
    """File with a line for each document of part number ``part``."""
    return f"{TOKENS}/{part:06d}.documents.jsonl"
