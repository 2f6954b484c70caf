"""The files of shards while they are written, under temporary names: every state at its place, and when it is
durable."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.files import naming_store, start_writing_back, write_all
from nemo_qwen_hidden.store.format import Shard
from nemo_qwen_hidden.store.header import Header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.shard import DIVISOR, SCALE, header_of
from nemo_qwen_hidden.store.statistics import StoredError
from nemo_qwen_hidden.store.tensors import row_bytes
from nemo_qwen_hidden.store.write.encode import Encoded
from nemo_qwen_hidden.store.write.seal import partial_path

SENT_OFF_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive states of a call that are to be written; the first is at ``index`` of its values."""

    first_state: int
    length: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one call hands to the disk thread."""

    point: HookPoint
    pieces: tuple[Piece, ...]
    encoded: Encoded
    divisor: torch.Tensor | None

    @property
    def bytes(self) -> int:
        return self.encoded.values.nbytes


@dataclass(frozen=True, kw_only=True)
class Written:
    """States that are in a shard's file. error: what storing them cost, where it cost anything."""

    shard: Shard
    first_state: int
    states: int
    error: StoredError | None


class ShardFiles:
    """Shards under temporary names, some of them open."""

    def __init__(self, folder: Path, target: Manifest, max_open: int) -> None:
        self._folder, self._target, self._max_open = folder, target, max_open
        self._open: OrderedDict[Shard, int] = OrderedDict()  # descriptors, least recently used first
        self._headers: dict[Shard, Header] = {}
        self._unsynced: dict[Shard, None] = {}
        self._waiting: dict[Shard, None] = {}
        self._waiting_bytes = 0

    def write(self, batch: Batch) -> Iterator[Written]:
        """Writes all states of a batch; yields what is in the file of each shard, piece by piece."""
        dtype, encoded = self._target.dtype, batch.encoded
        of_each_state = {SCALE: encoded.scale, DIVISOR: batch.divisor}
        columns = [(str(batch.point), self._target.entry(batch.point).width * dtype.bytes, row_bytes(encoded.values))]
        columns += [(name, 4, row_bytes(column)) for name, column in of_each_state.items() if column is not None]
        with naming_store(self._folder, str(batch.point)):
            for piece in batch.pieces:
                for number, state, size in self._target.grid.pieces(piece.first_state, piece.length):
                    shard, start = (batch.point, number), piece.index + state - piece.first_state
                    in_shard = state - self._target.grid.starts[number]
                    for name, item, data in columns:
                        self._put(shard, name, in_shard * item, data[start * item : (start + size) * item])
                    error = None if encoded.error is None else StoredError.of(encoded.error[start : start + size])
                    yield Written(shard=shard, first_state=state, states=size, error=error)
            self._send_off()

    def sync(self, others: Iterable[Shard] = ()) -> None:
        """Returns when everything written is durable, and what somebody else has written to ``others`` before."""
        for shard in {**self._unsynced, **dict.fromkeys(others)}:
            with naming_store(self._folder, str(shard[0])):
                os.fsync(self._descriptor(shard))
        self._unsynced.clear()
        self._waiting.clear()
        self._waiting_bytes = 0

    def forget(self, shards: Iterable[Shard]) -> None:
        """Closes files that are not written any more."""
        for shard in shards:
            del self._headers[shard]
            if shard in self._open:
                os.close(self._open.pop(shard))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _put(self, shard: Shard, tensor: str, offset: int, data: memoryview) -> None:
        if shard not in self._headers:
            self._headers[shard] = self._make(shard)
        write_all(self._descriptor(shard), data, self._headers[shard].offsets[tensor] + offset)
        self._unsynced[shard] = self._waiting[shard] = None
        self._waiting_bytes += len(data)

    def _send_off(self) -> None:
        """Has the disk begin with what waits in memory: else it would idle until the next ``sync``, and then all of
        it would have to be waited for."""
        if self._waiting_bytes >= SENT_OFF_BYTES:
            for shard in self._waiting:
                start_writing_back(self._descriptor(shard))
            self._waiting.clear()
            self._waiting_bytes = 0

    def _make(self, shard: Shard) -> Header:
        """Makes the file unless another rank has.

        Every rank writes the same header and sets the same length, so it does not matter who comes first.
        ``posix_fallocate`` would reserve the space too, but where the file system lacks it glibc writes zeros into
        blocks that look empty, and can so wipe out what another rank writes at that moment.
        """
        start, header = header_of(shard, self._target)
        with suppress(FileExistsError):  # of what is there, opening the file tells; it may be going at this moment
            os.mkdir(self._folder / str(shard[0]))
        descriptor = self._descriptor(shard, os.O_CREAT)
        os.ftruncate(descriptor, header.size_bytes)
        write_all(descriptor, start, 0)
        return header

    def _descriptor(self, shard: Shard, create: int = 0) -> int:
        """An open descriptor of the shard. Closing one to make place does not sync: ``sync`` opens it again, and
        the kernel reports a failed write-back to whoever syncs next."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1])
        path = partial_path(self._folder, shard)
        self._open[shard] = os.open(path, create | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        return self._open[shard]
