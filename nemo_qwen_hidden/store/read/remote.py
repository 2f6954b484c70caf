"""Stores on other file systems, through fsspec: the bytes of the states asked for, in few requests, many at a time.

Legend: n states asked for, H numbers in each.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.entries import ShardEntry
from nemo_qwen_hidden.store.header import LENGTH_BYTES, Header, TensorSpec, header_length, parse_header
from nemo_qwen_hidden.store.manifest import Manifest
from nemo_qwen_hidden.store.read.maps import NUMPY_DTYPES, view_of
from nemo_qwen_hidden.store.read.rows import Rows, resolve
from nemo_qwen_hidden.store.read.source import Column, Folder, check_small
from nemo_qwen_hidden.store.read.stored import Locator, StoredStates, check_shard
from nemo_qwen_hidden.store.shard import MOMENTS, NORMS, SCALE
from nemo_qwen_hidden.store.statistics import Sums

GAP_BYTES = 1 << 14  # between states that one request gets
REQUEST_BYTES = 1 << 23  # at most
AT_ONCE_BYTES = 1 << 26  # of requests that are under way together
_HEAD_BYTES = 1 << 11  # holds the header of every file that this package writes
_SHARDS_AT_ONCE = 64
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``stop`` of a file of the store."""

    file: str
    start: int
    stop: int


def open_url(url: str, options: Mapping[str, Any]) -> "Folder | RemoteFolder":
    """The files below ``url``: a folder where they are on this machine after all.

    Raises:
        StoreError: fsspec does not know the file system, or it does not take the options.
    """
    try:
        system, root = fsspec.core.url_to_fs(url, **options)
    except Exception as error:  # each file system has errors of its own
        raise StoreError("store", f"must be a URL that fsspec can open ({error})", url) from error
    return Folder(Path(root)) if isinstance(system, LocalFileSystem) else RemoteFolder(url, system, root)


class RemoteFolder:
    """A ``Source`` on another file system."""

    def __init__(self, url: str, system: Any, root: str) -> None:
        self.location, self._system, self._root = url.rstrip("/"), system, root.rstrip("/")
        self._process = os.getpid()

    def name(self, file: str) -> str:
        return f"{self.location}/{file}"

    def exists(self, file: str) -> bool:
        return bool(self._call(self.location, "exists", self._path(file)))

    def read(self, file: str) -> bytes:
        (size,) = self.sizes([file])
        check_small(size, self.name(file))
        return self.get([Span(file, 0, size)])[0]

    def lines(self, file: str) -> NDArray[np.uint8]:
        return np.frombuffer(self.read(file), np.uint8)

    def tensors(self, file: str) -> tuple[Header, dict[str, Column]]:
        (header,) = self.headers([file])
        columns = {name: RemoteColumn(self, file, spec, header.offsets[name]) for name, spec in header.tensors.items()}
        return header, dict(columns)

    def headers(self, files: Sequence[str]) -> list[Header]:
        """The headers of safetensors files, checked against their sizes."""
        sizes = self.sizes(files)
        heads = self.get([Span(file, 0, min(size, _HEAD_BYTES)) for file, size in zip(files, sizes, strict=True)])
        found = []
        for file, size, head in zip(files, sizes, heads, strict=True):
            end = LENGTH_BYTES + header_length(head, size, self.name(file))
            if len(head) < end:
                (head,) = self.get([Span(file, 0, end)])
            found.append(parse_header(head, size, self.name(file)))
        return found

    def sizes(self, files: Sequence[str]) -> list[int]:
        """In bytes, of each file."""
        try:
            found = self._call(self.location, "sizes", [self._path(file) for file in files])
        except StoreError:
            found = [self._call(self.name(file), "size", self._path(file)) for file in files]  # to name the one
        return [int(size) for size in found]

    def get(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span, requested together; nothing is requested for an empty one."""
        wanted = [span for span in spans if span.start < span.stop]
        if not wanted:
            return [b""] * len(spans)
        paths = [self._path(span.file) for span in wanted]
        starts, stops = [span.start for span in wanted], [span.stop for span in wanted]
        found = dict(zip(wanted, self._call(self.location, "cat_ranges", paths, starts, stops), strict=True))
        for span, data in found.items():
            if isinstance(data, BaseException):
                raise _unreadable(self.name(span.file), data) from data
            if len(data) != span.stop - span.start:
                rule = f"must hold bytes {span.start} to {span.stop - 1}"
                raise StoreError(self.name(span.file), rule, f"{len(data)} of them")
        return [found.get(span, b"") for span in spans]

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}"

    def _call(self, named: str, method: str, *arguments: Any) -> Any:
        if self._process != os.getpid():  # clients and their threads do not survive a fork, they hang
            rule = "can be read by the process that opened it, and by workers that are spawned, not forked "
            raise StoreError(named, f"{rule}(multiprocessing_context='spawn')", f"process {os.getpid()}")
        try:
            return getattr(self._system, method)(*arguments)
        except Exception as error:  # each file system has errors of its own
            raise _unreadable(named, error) from error


class RemoteColumn:
    """A ``Column`` of a safetensors file on another file system."""

    def __init__(self, folder: RemoteFolder, file: str, spec: TensorSpec, offset: int) -> None:
        self._folder, self._file, self._spec, self._offset = folder, file, spec, offset
        self.dtype, self.ndim = NUMPY_DTYPES[spec.dtype], len(spec.shape)

    def __len__(self) -> int:
        return self._spec.shape[0]

    def __getitem__(self, rows: Rows, /) -> Any:
        chosen = resolve(rows, len(self))
        numbers = np.atleast_1d(np.asarray(chosen, np.int64))
        starts = self._offset + numbers * self.dtype.itemsize
        data = fetch(self._folder, [self._file], np.zeros_like(numbers), starts, self.dtype.itemsize)
        values = data.reshape(-1).view(self.dtype)
        return values[0] if isinstance(chosen, int) else values

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a column on another file system cannot be an array without a copy")
        spans = [Span(self._file, *span) for span in _cut(self._offset, self._offset + self._spec.bytes)]
        data = np.frombuffer(bytearray(b"".join(self._folder.get(spans))), np.uint8)
        return view_of(data, self._spec, 0).astype(dtype or self.dtype, copy=False)


class RemoteShards:
    """A ``ShardReader`` on another file system; of a shard it gets the header once, then states."""

    def __init__(self, folder: RemoteFolder, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._locator, self._widths = Locator(manifest), [entry.width for entry in manifest.hook_points]
        shape = (len(manifest.hook_points), manifest.grid.shards)
        self._values, self._scales = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)

    def consecutive(self, points: Sequence[int], first_state: int, count: int) -> list[StoredStates]:
        if count:  # before memory is taken for states that a store may only claim to have
            self._open(points, np.array([self._manifest.grid.shard_of(first_state)]))
        return self.scattered(points, np.arange(first_state, first_state + count))

    def scattered(self, points: Sequence[int], states: NDArray[np.int64]) -> list[StoredStates]:
        found: dict[int, StoredStates] = {}
        for width in dict.fromkeys(self._widths[point] for point in points):
            alike = [point for point in points if self._widths[point] == width]
            found |= zip(alike, self._of_width(alike, states, width), strict=True)
        return [found[point] for point in points]

    def _of_width(self, points: Sequence[int], states: NDArray[np.int64], width: int) -> list[StoredStates]:
        """At hook points whose states have as many numbers, so that one call gets all of them."""
        shards, inside = self._locator.find(states)
        distinct, place = np.unique(shards, return_inverse=True)
        self._open(points, distinct)
        entries = [self._manifest.hook_points[point] for point in points]
        files = [_file(entry.shards[shard]) for entry in entries for shard in distinct.tolist()]
        of_file = np.concatenate([place + number * len(distinct) for number in range(len(points))])
        dtype = self._manifest.dtype

        def parts(first: NDArray[np.int64], size: int, kind: np.dtype[Any]) -> list[NDArray[Any]]:
            """What each state has at ``first`` of its shard, [hook points, shards]: of each hook point."""
            starts = np.concatenate([first[point, shards] + inside * size for point in points])
            return np.split(fetch(self._folder, files, of_file, starts, size).view(kind), len(points))

        values = parts(self._values, width * dtype.bytes, dtype.container)
        scales = parts(self._scales, _SCALE_BYTES, np.dtype("<f4")) if dtype.scaled else [None] * len(points)
        return [
            StoredStates.of(bits, None if scale is None else scale[:, 0], dtype)
            for bits, scale in zip(values, scales, strict=True)
        ]

    def sums(self, point: int, shards: range) -> Iterator[Sums]:
        listed = self._manifest.hook_points[point].present
        for first in range(0, len(shards), _SHARDS_AT_ONCE):
            numbers = shards[first : first + _SHARDS_AT_ONCE]
            files = [listed[number].file for number in numbers]
            headers = self._checked(point, numbers, files)
            spans = [
                Span(file, header.offsets[name], header.offsets[name] + header.tensors[name].bytes)
                for file, header in zip(files, headers, strict=True)
                for name in (MOMENTS, NORMS)
            ]
            data = [np.frombuffer(found, np.uint8) for found in self._folder.get(spans)]
            for header, moments, norms in zip(headers, data[::2], data[1::2], strict=True):
                yield Sums(
                    moments=view_of(moments, header.tensors[MOMENTS], 0), norms=view_of(norms, header.tensors[NORMS], 0)
                )

    def _open(self, points: Sequence[int], shards: NDArray[np.int64]) -> None:
        """Checks headers that have not been seen, and notes where values start."""
        for point in points:
            entry = self._manifest.hook_points[point]
            unseen = shards[self._values[point, shards] < 0].tolist()
            for first in range(0, len(unseen), _SHARDS_AT_ONCE):
                numbers = unseen[first : first + _SHARDS_AT_ONCE]
                files = [_file(entry.shards[number]) for number in numbers]
                for number, header in zip(numbers, self._checked(point, numbers, files), strict=True):
                    self._scales[point, number] = header.offsets.get(SCALE, 0)
                    self._values[point, number] = header.offsets[str(entry.point)]

    def _checked(self, point: int, shards: Iterable[int], files: Sequence[str]) -> list[Header]:
        headers = self._folder.headers(files)
        for shard, file, header in zip(shards, files, headers, strict=True):
            check_shard(self._manifest, point, shard, header, self._folder.name(file))
        return headers


def fetch(
    folder: RemoteFolder, files: Sequence[str], of_file: NDArray[np.int64], starts: NDArray[np.int64], length: int
) -> NDArray[np.uint8]:
    """uint8 [n, length]: ``length`` bytes from each of ``starts``, [n], of the file whose index stands in ``of_file``,
    [n]. What lies near each other in a file is got by one request."""
    found = np.empty((len(starts), length), np.uint8)
    order = np.lexsort((starts, of_file))
    of_file, starts = of_file[order], starts[order]
    firsts = _request_starts(of_file, starts, length)
    bounds = [*firsts.tolist(), len(starts)]
    requests = [
        (first, stop, Span(files[of_file[first]], int(starts[first]), int(starts[stop - 1]) + length))
        for first, stop in pairwise(bounds)
    ]
    for together in _within(requests, AT_ONCE_BYTES):
        pieces = folder.get([span for _, _, span in together])
        data = np.frombuffer(b"".join(pieces), np.uint8)
        begins = np.cumsum([0, *map(len, pieces)])
        offsets = [
            starts[first:stop] - span.start + begin
            for (first, stop, span), begin in zip(together, begins.tolist(), strict=False)
        ]
        windows = as_strided(data, (len(data) - length + 1, length), (1, 1), writeable=False)
        found[order[together[0][0] : together[-1][1]]] = windows[np.concatenate(offsets)]
    return found


def _request_starts(of_file: NDArray[np.int64], starts: NDArray[np.int64], length: int) -> NDArray[np.intp]:
    """The first index of each request, where indices are sorted by file and start."""
    if not len(starts):
        return np.zeros(0, np.intp)
    apart = (np.diff(of_file) != 0) | (np.diff(starts) > length + GAP_BYTES)
    first = np.concatenate(([True], apart))
    since = starts - starts[np.flatnonzero(first)][np.cumsum(first) - 1]  # from the start of the stretch without gaps
    first[1:] |= np.diff(since // max(1, REQUEST_BYTES - length)) > 0
    return np.flatnonzero(first)


def _within(requests: Sequence[tuple[int, int, Span]], size: int) -> Iterator[list[tuple[int, int, Span]]]:
    """Consecutive requests, together about ``size`` bytes."""
    together: list[tuple[int, int, Span]] = []
    total = 0
    for request in requests:
        together.append(request)
        total += request[2].stop - request[2].start
        if total >= size:
            yield together
            together, total = [], 0
    if together:
        yield together


def _cut(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, REQUEST_BYTES):
        yield first, min(first + REQUEST_BYTES, stop)


def _file(entry: ShardEntry | None) -> str:
    assert entry is not None, "a manifest that from_json has passed lists every shard"
    return entry.file


def _unreadable(named: str, error: BaseException) -> StoreError:
    return StoreError(named, "must be a file that can be read", f"{type(error).__name__}: {error}")
