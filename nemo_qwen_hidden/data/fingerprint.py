"""One hash over a whole data set, the same however it was batched, split over files or laid out on ranks."""

import hashlib

from nemo_qwen_hidden.data.tokenize import TokenizedDocument


class DataFingerprint:
    """sha256 over document ids and token ids, in order. Where the documents came from is left out, and so are masks:
    what they choose stands in the token table itself, which has a hash of its own."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, document: TokenizedDocument) -> None:
        """Adds the next document."""
        name = document.id.encode()
        # Lengths first, so that no two data sets give the same bytes.
        self._hash.update(len(name).to_bytes(8, "little") + name)
        self._hash.update(len(document.token_ids).to_bytes(8, "little"))
        self._hash.update(document.token_ids.astype("<i4").tobytes())

    def hexdigest(self) -> str:
        """The hash of all documents so far."""
        return self._hash.hexdigest()
