"""Reads a store: opens without touching a shard, maps shards when their rows are asked for, copies only those rows.

Needs neither NeMo nor Megatron. Legend: N rows of the store, n rows asked for, H hidden.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.fields import load_json
from nemo_qwen_hidden.store.files import open_inside
from nemo_qwen_hidden.store.folder import describe_marker
from nemo_qwen_hidden.store.format import DTYPES, MANIFEST, MARKER
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.maps import map_tensors
from nemo_qwen_hidden.store.rows import Rows, resolve
from nemo_qwen_hidden.store.tensors import TORCH_DTYPES, empty
from nemo_qwen_hidden.store.tokens import TokenTable


class UnknownHookPointError(StoreError, KeyError):
    """The store does not hold this hook point."""

    __str__ = Exception.__str__  # KeyError's would put the message in quotes


def open_store(path: str | os.PathLike[str]) -> "Store":
    """The store at ``path``. Reads the manifest and the header of the token table; no shard is opened.

    Raises:
        StoreNotFoundError: there is none, or an unfinished one.
        StoreError: the manifest or the token table is not what it should be; names file and field.
    """
    folder = Path(path)
    if not os.path.lexists(folder / MANIFEST):
        raise StoreNotFoundError("store", _missing(folder), str(folder))
    manifest = Manifest.from_json(_read(folder, MANIFEST), str(folder / MANIFEST))
    if len(manifest.tokens) != 1:
        rule = "must be one part, which is what this release of nemo_qwen_hidden reads"
        raise StoreError(f"{folder / MANIFEST}: tokens", rule, len(manifest.tokens))
    return Store(folder, manifest, TokenTable(folder, manifest.tokens[0]))


class Store:
    """A finished store; made by ``open_store``.

    Attributes:
        path: its folder. manifest: what it is. tokens: what each row is.
    """

    def __init__(self, path: Path, manifest: Manifest, tokens: TokenTable) -> None:
        self.path, self.manifest, self.tokens = path, manifest, tokens
        self._views = {str(entry.point): HookPointView(path, manifest, entry) for entry in manifest.hook_points}

    @property
    def hook_points(self) -> tuple[str, ...]:
        """What is stored, as ``resid_post@12``, in order of depth."""
        return tuple(self._views)

    @property
    def rows(self) -> int:
        """N, the number of tokens."""
        return self.manifest.rows

    @property
    def documents(self) -> int:
        """The number of documents."""
        return self.manifest.documents

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.manifest.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return TORCH_DTYPES[self.manifest.stored_dtype]

    def __getitem__(self, hook_point: str | HookPoint) -> "HookPointView":
        """The states at one hook point, [N, H], not read yet; UnknownHookPointError where the store lacks it."""
        view = self._views.get(str(hook_point))
        if view is None:
            names = self.hook_points
            shown = ", ".join(names if len(names) <= 8 else (*names[:4], "...", *names[-3:]))
            raise UnknownHookPointError("hook point", f"must be one that {self.path} holds ({shown})", str(hook_point))
        return view

    def __contains__(self, hook_point: object) -> bool:
        return str(hook_point) in self._views

    def document(self, index: int) -> "StoredDocument":
        """Document number ``index``; IndexError where there is none."""
        info = self.tokens.document_info(index)
        rows = self.tokens.document_rows(index)
        return StoredDocument(index=index, id=info.id, source=info.source, rows=rows, store=self)

    def __repr__(self) -> str:
        points = f"{len(self._views)} hook points" if len(self._views) != 1 else next(iter(self._views))
        size = f"{self.rows} rows x {self.hidden_size}, {self.manifest.stored_dtype}, {self.documents} documents"
        return f"Store({str(self.path)!r}: {points} x {size})"


@dataclass(frozen=True, kw_only=True)
class StoredDocument:
    """One document of a store. rows: its rows. ``document["resid_post@3"]`` gives its states, [tokens, H]."""

    index: int
    id: str
    source: str
    rows: range
    store: Store

    @property
    def token_id(self) -> NDArray[np.int32]:
        """[tokens], a view of the token table."""
        return self.store.tokens.token_id[self.rows.start : self.rows.stop]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, hook_point: str | HookPoint) -> torch.Tensor:
        """[tokens, H] in the stored dtype; UnknownHookPointError where the store lacks the hook point."""
        return self.store[hook_point][self.rows]

    def __repr__(self) -> str:
        rows = f"rows {self.rows.start} to {self.rows.stop - 1}" if self.rows else "no rows"
        return f"StoredDocument({self.index}: {self.id!r}, {rows}, from {self.source!r})"


class HookPointView:
    """The states at one hook point, [N, H], read on demand: ``view[rows]`` copies those rows out of their shards.

    ``rows`` is an int (gives [H]), or a slice, a range, a list, a numpy array or a torch tensor of row numbers, or a
    boolean mask over all rows (gives [n, H], order and repeats kept).

    Raises (on indexing):
        IndexError: a row that is not there. TypeError: another kind of index.
        StoreError: a shard is missing or is not what the manifest says; names the file.
    """

    def __init__(self, folder: Path, manifest: Manifest, entry: HookPointEntry) -> None:
        self._folder, self._entry, self._grid = folder, entry, manifest.grid
        self._dtype, self._hidden_size = DTYPES[manifest.stored_dtype], manifest.hidden_size
        self._shards: dict[int, NDArray[Any]] = {}

    @property
    def hook_point(self) -> HookPoint:
        return self._entry.point

    @property
    def norm(self) -> str:
        """Whether the states were taken ``before`` or ``after`` the model's final norm."""
        return self._entry.norm

    @property
    def shape(self) -> tuple[int, int]:
        """N, H."""
        return self._grid.rows, self._hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype, which indexing gives."""
        return TORCH_DTYPES[self._dtype.name]

    def __len__(self) -> int:
        return self._grid.rows

    def __getitem__(self, rows: Rows) -> torch.Tensor:
        """[n, H], or [H] for an int: a copy that owns its memory."""
        chosen = resolve(rows, self._grid.rows)
        if isinstance(chosen, int):
            return self._consecutive(chosen, 1)[0]
        if isinstance(chosen, range) and chosen.step == 1:
            return self._consecutive(chosen.start, len(chosen))
        return self._scattered(np.asarray(chosen, np.int64))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Each row, [H]."""
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        rows, hidden_size = self.shape
        taken = f"{self._dtype.name}, {self.norm} the final norm"
        return f"HookPointView({self._entry.point}: {rows} rows x {hidden_size}, {taken})"

    def _consecutive(self, first_row: int, count: int) -> torch.Tensor:
        tensor_nH, out_nH = empty((count, self._hidden_size), self._dtype)
        for shard, row, size in self._grid.pieces(first_row, count):
            start = row - shard * self._grid.shard_rows
            out_nH[row - first_row : row - first_row + size] = self._shard(shard)[start : start + size]
        return tensor_nH

    def _scattered(self, rows: NDArray[np.int64]) -> torch.Tensor:
        tensor_nH, out_nH = empty((len(rows), self._hidden_size), self._dtype)
        if not len(rows):
            return tensor_nH
        shards, inside = np.divmod(rows, self._grid.shard_rows)
        order = np.argsort(shards, kind="stable")
        present, starts = np.unique(shards[order], return_index=True)
        for shard, places in zip(present, np.split(order, starts[1:]), strict=True):
            out_nH[places] = self._shard(int(shard))[inside[places]]
        return tensor_nH

    def _shard(self, shard: int) -> NDArray[Any]:
        """[rows of the shard, H], mapped and checked at first use."""
        if shard not in self._shards:
            self._shards[shard] = self._map(shard)
        return self._shards[shard]

    def _map(self, shard: int) -> NDArray[Any]:
        listed, name = self._entry.shards[shard], str(self._entry.point)
        header, tensors = map_tensors(self._folder, listed.file)
        found = {"bytes": header.size_bytes, "tensors": {k: (v.dtype, v.shape) for k, v in header.tensors.items()}}
        shape = (listed.rows, self._hidden_size)
        expected = {"bytes": listed.bytes, "tensors": {name: (self._dtype.safetensors, shape)}}
        labels = {"hook_point": name, "first_row": str(listed.first_row), "rows": str(listed.rows), "norm": self.norm}
        found |= {label: header.metadata.get(label) for label in labels}
        for label, value in {**expected, **labels}.items():
            if found[label] != value:
                rule = f"must have {label} {value}, as the manifest says"
                raise StoreError(str(self._folder / listed.file), rule, found[label])
        return tensors[name]


def _read(folder: Path, name: str) -> bytes:
    with os.fdopen(open_inside(folder, name), "rb") as file:
        return file.read()


def _missing(folder: Path) -> str:
    """Why there is no store at ``folder``, as the rule of an error."""
    if not os.path.lexists(folder / MARKER):
        return f"must be the folder of a store, with a {MANIFEST}"
    begun = describe_marker(load_json(_read(folder, MARKER), str(folder / MARKER)))
    return f"must be a finished store; this one is still being made, or was left unfinished ({begun})"
