"""Stores as data sets of torch: rows in a global shuffle, or documents padded to batches.

A data set is a sequence of batches, numbered on over epochs, so that where a training run stands is one number, however
many workers load. Of a store that keeps some rows alone, these are the data. Legend: n rows of a batch, B documents of
a batch, S kept rows of the one that has most, H numbers of a state.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.read.reader import Store
from nemo_qwen_hidden.store.read.shuffle import Deal
from nemo_qwen_hidden.store.read.views import HookPointView

HookPoints = Iterable[str | HookPoint | HookPointView]
Batch = dict[str, torch.Tensor]
COLUMNS = ("row", "token_id", "document", "position")


class _Batches(Dataset[Batch]):
    """What both kinds share. ``data[i]`` is batch i of this rank; the first batch of epoch e is ``e * len(data)``, and
    ``data[i]`` goes on for ever. Workers that are spawned open the store for themselves."""

    def __init__(self, store: Store, hook_points: HookPoints | None, deal: Deal) -> None:
        self._store, self._deal = store, deal
        self._views = store.views(hook_points)

    @property
    def deal(self) -> Deal:
        """Which rows or documents lie in which batch."""
        return self._deal

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return len(self._deal)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the first epoch."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        raise NotImplementedError


class RowBatches(_Batches):
    """Batches of rows, each row once an epoch, by default in a shuffle over the whole store.

    A batch has, by the name of each hook point, its states [n, H], and beside them int64 [n]: ``row``, and what the
    token table says of it, ``token_id``, ``document`` and ``position``.

    Args:
        store: what ``open_store`` gives.
        batch_rows: n, but for a last batch that may be shorter.
        hook_points: names, or views such as ``store["resid_post@12"].float()``; all by default.
        seed: of the shuffle, which is another one in each epoch; None for the order of the store.
        rank, world: of the processes that train together; each gets other rows.
        remainder: ``keep``, ``drop`` or ``repeat``, see ``shuffle.Deal``. With ``keep`` the last batch may be shorter,
            and some ranks get one batch more than others, at which DistributedDataParallel hangs: use another there.
        columns: which of those four a batch has. Of a store that is not on this machine they cost requests.

    Raises:
        StoreError: the store lacks a hook point, or a number is out of its range.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch_rows: int,
        hook_points: HookPoints | None = None,
        seed: int | None = 0,
        rank: int = 0,
        world: int = 1,
        remainder: str = "keep",
        columns: Iterable[str] = COLUMNS,
    ) -> None:
        deal = Deal(count=store.states, size=batch_rows, seed=seed, rank=rank, world=world, remainder=remainder)
        super().__init__(store, hook_points, deal)
        self._columns = tuple(columns)
        for column in self._columns:
            if column not in COLUMNS:
                raise StoreError("columns", f"must be some of {', '.join(COLUMNS)}", column)

    def __getitem__(self, index: int) -> Batch:
        """Batch ``index``; IndexError where it is negative, or the store has no rows."""
        states = self._deal.members(index)
        rows = self._store.row_of_states(states)
        batch = self._store.read(states, self._views.values())
        for column in self._columns:
            numbers = rows if column == "row" else getattr(self._store.tokens, column)[rows]
            batch[column] = torch.from_numpy(np.asarray(numbers, np.int64))
        return batch


class DocumentBatches(_Batches):
    """Batches of whole documents, each once an epoch, padded behind to the longest of the batch.

    A batch has, by the name of each hook point, its states [B, S, H], 0 in the padding, and beside them ``token_id``
    int64 [B, S], ``row`` and ``position`` int64 [B, S], -1 in the padding, ``attention_mask`` bool [B, S], True where
    there is a state, ``length`` int64 [B], the number of kept rows, and ``document`` int64 [B].

    Args:
        batch_documents: B, but for a last batch that may be shorter.
        pad_id: token id of the padding. The others: see ``RowBatches``.

    Raises:
        StoreError: the store lacks a hook point, or a number is out of its range.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch_documents: int,
        hook_points: HookPoints | None = None,
        seed: int | None = 0,
        rank: int = 0,
        world: int = 1,
        remainder: str = "keep",
        pad_id: int = 0,
    ) -> None:
        deal = Deal(count=store.documents, size=batch_documents, seed=seed, rank=rank, world=world, remainder=remainder)
        super().__init__(store, hook_points, deal)
        self._pad_id = pad_id

    def __getitem__(self, index: int) -> Batch:
        """Batch ``index``; IndexError where it is negative, or the store has no documents."""
        documents = self._deal.members(index)
        tokens = self._store.tokens
        ranges = [tokens.document_states(int(document)) for document in documents]
        states = np.concatenate([np.arange(found.start, found.stop) for found in ranges])
        rows = self._store.row_of_states(states)
        length = torch.tensor([len(found) for found in ranges])
        mask_BS = torch.arange(int(length.max())) < length[:, None]
        batch = {
            name: _padded(values_nH, mask_BS)
            for name, values_nH in self._store.read(states, self._views.values()).items()
        }
        return batch | {
            "token_id": _padded_numbers(tokens.token_id[rows], mask_BS, self._pad_id),
            "row": _padded_numbers(rows, mask_BS, -1),
            "position": _padded_numbers(tokens.position[rows], mask_BS, -1),
            "attention_mask": mask_BS,
            "length": length,
            "document": torch.from_numpy(documents),
        }


def _padded(values_nH: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    padded_BSH = values_nH.new_zeros((*mask_BS.shape, values_nH.shape[1]))
    padded_BSH[mask_BS] = values_nH
    return padded_BSH


def _padded_numbers(numbers: NDArray[Any], mask_BS: torch.Tensor, padding: int) -> torch.Tensor:
    padded_BS = torch.full(mask_BS.shape, padding)
    padded_BS[mask_BS] = torch.from_numpy(np.asarray(numbers, np.int64))
    return padded_BS


class BatchLoader:
    """Loads batches ahead in workers, and knows how many of them it has handed out.

    Each ``for batch in loader`` gives the rest of an epoch; the next one gives the next epoch. What ``state_dict``
    says inside the loop counts the batch at hand as done. A loader that is given that state goes on with the batch
    after it, with any number of workers. It is the same on every rank that has had as many batches.

    Args:
        batches: a RowBatches or DocumentBatches.
        options: of torch's DataLoader, ``num_workers`` above all; without ``batch_size``, ``shuffle`` and samplers.
    """

    def __init__(self, batches: RowBatches | DocumentBatches, **options: Any) -> None:
        self._batches, self._done = batches, 0
        self._loader = DataLoader(batches, batch_size=None, sampler=_Rest(self), **options)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self._done += 1
            yield batch

    @property
    def rest(self) -> range:
        """The batches of this epoch that have not been handed out; of the next where none is left."""
        size = len(self._batches)
        return range(self._done, (self._done // size + 1) * size) if size else range(0)

    @property
    def epoch(self) -> int:
        """Of the next batch, from 0."""
        return self._done // max(1, len(self._batches))

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as JSON values."""
        return {"batches": self._done, "deal": self._batches.deal.as_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another loader stood.

        Raises:
            StoreError: that one had other batches: of a store of another size, say, or for another number of ranks.
        """
        deal = self._batches.deal.as_dict()
        if state["deal"] != deal:
            raise StoreError("state_dict", f"must be of a loader of the same batches ({deal})", state["deal"])
        self._done = int(state["batches"])


class _Rest(Sampler[int]):
    """The batches that are left, asked anew at each start."""

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[int]:
        return iter(self._loader.rest)

    def __len__(self) -> int:
        return len(self._loader.rest)
