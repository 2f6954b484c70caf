"""The states at one hook point, read on demand, and what can be done to them on the way out.

Legend: K states of the store, n states asked for, H numbers in each: of the residual stream, the hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import EMBED, RESID_MID, RESID_POST, RESID_PRE, HookPoint
from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.manifest import MEANS, Manifest
from nemo_qwen_hidden.store.read.rows import Rows
from nemo_qwen_hidden.store.statistics import Statistics, StoredError

RESIDUAL_STREAM = (EMBED, RESID_PRE, RESID_MID, RESID_POST)


class ViewedStore(Protocol):
    """What a view needs of its store, ``reader.Store``, which says more of each."""

    path: Path | str

    @property
    def manifest(self) -> Manifest: ...

    @property
    def states(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def final_norm(self) -> tuple[torch.Tensor, float]: ...

    def read_views(self, states: Rows, views: "Sequence[HookPointView]") -> list[torch.Tensor]: ...

    def statistics(self, hook_point: HookPoint) -> Statistics: ...

    def divisor(self, hook_point: HookPoint, states: Rows) -> torch.Tensor: ...


class HookPointView:
    """The states at one hook point, [K, H], read on demand: ``view[states]`` copies those states out of their shards.

    ``states`` is an int (gives [H]), or a slice, a range, a list, a numpy array or a torch tensor of their numbers, or
    a boolean mask over all (gives [n, H], order and repeats kept). In a full store a state has the number of its row;
    in one that keeps some rows alone ``store.state_of_rows`` and ``store.row_of_states`` say which is which. Values
    have the stored dtype; of int8, where each state has a scale, they are float32.

    A state per head, or of attention weights, is flat here: ``view[states].reshape(-1, *view.state_shape)`` gives it
    its axes.

    ``float``, ``to``, ``normed``, ``unnormed`` and ``standardized`` give views of the same states that do so to every
    one that is read. They read and compute nothing by themselves.

    Raises (on indexing):
        IndexError: a state that is not there. TypeError: another kind of index.
        StoreError: a shard is missing or is not what the manifest says; names the file.
    """

    def __init__(self, store: ViewedStore, entry: HookPointEntry, steps: "tuple[Step, ...]" = ()) -> None:
        self._store, self._entry, self._steps = store, entry, steps

    @property
    def store(self) -> ViewedStore:
        """What it is a view of."""
        return self._store

    @property
    def hook_point(self) -> HookPoint:
        return self._entry.point

    @property
    def norm(self) -> str:
        """Whether the values are from ``before`` or ``after`` the model's final norm."""
        changed = [step.norm for step in self._steps if isinstance(step, _Normed | _Unnormed)]
        return changed[-1] if changed else self._entry.norm

    @property
    def shape(self) -> tuple[int, int]:
        """K, H."""
        return self._store.states, self._entry.width

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The axes of one state, whose product is H: [hidden], [heads, head_dim] of queries and of what attention
        gives, [groups, head_dim] of keys and values, [heads, keys] of attention weights, [ffn] inside the MLP."""
        return self._entry.shape

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Of attention weights: which heads the first axis of ``state_shape`` is, None where it is all of them."""
        return self._entry.heads

    @property
    def dtype(self) -> torch.dtype:
        """What indexing gives."""
        return self._steps[-1].dtype if self._steps else self._store.dtype

    def __len__(self) -> int:
        return self._store.states

    def __getitem__(self, states: Rows) -> torch.Tensor:
        """[n, H], or [H] for an int: a copy that owns its memory."""
        return self._store.read_views(states, [self])[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Each state, [H]."""
        return (self[state] for state in range(len(self)))

    def __repr__(self) -> str:
        what = "rows" if self._store.states == self._store.manifest.rows else "states"
        size = " x ".join(map(str, self._entry.shape))
        taken = f"{self._store.manifest.stored_dtype}, {self._entry.norm} the final norm"
        steps = "".join(f".{step}" for step in self._steps)
        return f"HookPointView({self.hook_point}: {len(self)} {what} x {size}, {taken}){steps}"

    def numpy(self, states: Rows) -> NDArray[Any]:
        """What indexing gives, as a numpy array.

        Raises:
            TypeError: that is bfloat16, which numpy lacks.
        """
        if self.dtype == torch.bfloat16:
            raise TypeError(f"numpy has no bfloat16; use .float(), as in store[{str(self.hook_point)!r}].float()")
        values: NDArray[Any] = self[states].numpy()
        return values

    def to(self, dtype: torch.dtype) -> "HookPointView":
        """A view whose values are cast to ``dtype``; TypeError where that is not a float type."""
        if not dtype.is_floating_point:
            raise TypeError(f"states can be cast to a float type, but {dtype} is asked for instead")
        return self._then(_Cast(dtype))

    def float(self) -> "HookPointView":
        """A view whose values are float32."""
        return self.to(torch.float32)

    def normed(self) -> "HookPointView":
        """A view through the model's final RMSNorm, computed and given in float32: x / sqrt(mean(x**2) + eps) * weight.

        Raises:
            StoreError: the states are after that norm already, or of a site that is not the residual stream, or
                standardized, or means over tokens, or the store has no weight of the norm.
        """
        self._require_as_stored("normed()")
        self._require_of_tokens("normed()")
        setting = f"{self.hook_point}: normed()"
        if self._entry.norm == "after":
            raise StoreError(setting, "must be asked of states before the model's final norm", self._entry.meaning)
        if self.hook_point.site not in RESIDUAL_STREAM:
            rule = f"must be asked of the residual stream ({', '.join(RESIDUAL_STREAM)})"
            raise StoreError(setting, rule, self.hook_point.site)
        if self._store.manifest.final_norm is None:
            rule = "needs the weight of the model's final norm, which the store must hold"
            raise StoreError(setting, rule, str(self._store.path))
        return self._then(_Normed())

    def unnormed(self) -> "HookPointView":
        """A view of the states before the model's final norm, from those after it: y / weight * divisor, computed and
        given in float32, so that rounding of the stored dtype shows, and more so where a weight is small.

        Raises:
            StoreError: the states are not those after the final norm, or are standardized, or means over tokens, or
                were stored without the divisor of each. On indexing: a weight of the norm is 0.
        """
        self._require_as_stored("unnormed()")
        self._require_of_tokens("unnormed()")
        if not self._entry.divisor or self._store.manifest.final_norm is None:
            rule = "must be asked of states after the model's final norm, stored with the norm's weight and divisors"
            raise StoreError(f"{self.hook_point}: unnormed()", rule, self._entry.meaning)
        return self._then(_Unnormed())

    def standardized(self) -> "HookPointView":
        """A view with a mean of 0 in each dimension and a variance of 1 on average over dimensions, computed and given
        in float32: (x - mean) / sqrt(mean of variance), by the stored statistics. Sparse autoencoders are trained on
        such.

        Raises:
            StoreError: the view is normed or standardized. On indexing: fewer than two different rows are counted.
        """
        self._require_as_stored("standardized()")
        return self._then(_Standardized())

    def statistics(self) -> Statistics:
        """Of the stored values. The first call reads arrays beside the values of every shard, but no values."""
        return self._store.statistics(self.hook_point)

    def error(self) -> StoredError | None:
        """What storing in this dtype cost, over all states; None where it holds every value as it was."""
        known = [shard.error or StoredError(rows=shard.rows, units=0, max=0.0) for shard in self._entry.present]
        if all(shard.error is None for shard in self._entry.present):
            return None
        return sum(known[1:], known[0])

    def finish(self, values_nH: torch.Tensor, states: Rows) -> torch.Tensor:
        """[n, H] of ``states`` as they were stored, with everything done to them that this view does."""
        for step in self._steps:
            values_nH = step.apply(self, values_nH, states)
        return values_nH

    def _then(self, step: "Step") -> "HookPointView":
        return HookPointView(self._store, self._entry, (*self._steps, step))

    def _require_as_stored(self, asked: str) -> None:
        done = [step for step in self._steps if not isinstance(step, _Cast)]
        if done:
            rule = "must be asked of states as they were stored"
            raise StoreError(f"{self.hook_point}: {asked}", rule, f".{done[0]}")

    def _require_of_tokens(self, asked: str) -> None:
        """A norm of a mean is no mean of norms."""
        pooling = self._store.manifest.pooling
        if pooling in MEANS:
            rule = "must be asked of states of single tokens, since the norm does not go through a mean"
            raise StoreError(f"{self.hook_point}: {asked}", rule, f"pooling {pooling}")


class Step(Protocol):
    """Something done to states. dtype: of the result."""

    @property
    def dtype(self) -> torch.dtype: ...

    def apply(self, view: HookPointView, values_nH: torch.Tensor, states: Rows) -> torch.Tensor:
        """[n, H] of ``states`` of ``view``."""
        ...


@dataclass(frozen=True)
class _Cast:
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"to({self.dtype})"

    def apply(self, view: HookPointView, values_nH: torch.Tensor, states: Rows) -> torch.Tensor:
        return values_nH.to(self.dtype)


class _Normed:
    dtype, norm = torch.float32, "after"

    def __str__(self) -> str:
        return "normed()"

    def apply(self, view: HookPointView, values_nH: torch.Tensor, states: Rows) -> torch.Tensor:
        weight_H, eps = view.store.final_norm
        return torch.nn.functional.rms_norm(values_nH.float(), weight_H.shape, weight_H, eps)


class _Unnormed:
    dtype, norm = torch.float32, "before"

    def __str__(self) -> str:
        return "unnormed()"

    def apply(self, view: HookPointView, values_nH: torch.Tensor, states: Rows) -> torch.Tensor:
        weight_H, _ = view.store.final_norm
        if not weight_H.all():
            raise StoreError(f"{view.hook_point}: unnormed()", "needs a norm without a weight of 0", "one that has")
        divisor_n = view.store.divisor(view.hook_point, states).reshape(-1, 1)
        return values_nH.float() / weight_H * divisor_n


class _Standardized:
    dtype = torch.float32

    def __str__(self) -> str:
        return "standardized()"

    def apply(self, view: HookPointView, values_nH: torch.Tensor, states: Rows) -> torch.Tensor:
        known = view.statistics()
        variance = known.variance.mean()
        if not variance > 0:
            setting = f"{view.hook_point}: standardized()"
            raise StoreError(setting, "needs rows that differ from each other", f"{known.rows} counted rows, all equal")
        return (values_nH.float() - torch.from_numpy(known.mean).float()) / float(variance**0.5)
