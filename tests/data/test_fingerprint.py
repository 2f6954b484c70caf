"""One hash for one data set."""

import numpy as np

from nemo_qwen_hidden.data.fingerprint import DataFingerprint
from nemo_qwen_hidden.data.tokenize import TokenizedDocument


def fingerprint(*documents: tuple[str, list[int]], source: str = "s", dtype: str = "<i4") -> str:
    found = DataFingerprint()
    for name, ids in documents:
        found.update(TokenizedDocument(name, source, np.array(ids, dtype)))
    return found.hexdigest()


def test_it_is_pinned() -> None:
    """A change here makes every store of an earlier release look like one of other data."""
    assert fingerprint(("a", [1, 2]), ("é", [])) == "fc49f53d05bffaed6b2447794001fa18dc982369a6128fa67e7f00c833629ece"


def test_it_follows_ids_tokens_and_order_and_nothing_else() -> None:
    reference = fingerprint(("a", [1, 2]), ("b", [3]))
    assert reference == fingerprint(("a", [1, 2]), ("b", [3]), source="elsewhere")
    assert reference == fingerprint(("a", [1, 2]), ("b", [3]), dtype=">i4")
    others = [
        fingerprint(("a", [1]), ("b", [2, 3])),
        fingerprint(("a", [1, 2, 3]), ("b", [])),
        fingerprint(("a", [1, 2, 3])),
        fingerprint(("b", [3]), ("a", [1, 2])),
        fingerprint(("a", [1, 2]), ("c", [3])),
        fingerprint(("a", [1, 2]), ("b", [3]), ("", [])),
        fingerprint(),
    ]
    assert len({reference, *others}) == 1 + len(others)
