"""The drift of one step as flat numbers, for a logger."""

from collections.abc import Iterable
from dataclasses import asdict

from nemo_qwen_hidden.drift.change import MAX_NORM, change
from nemo_qwen_hidden.drift.labels import Labels
from nemo_qwen_hidden.drift.probe_accuracy import probe_accuracy
from nemo_qwen_hidden.drift.probe_set import ProbeSet
from nemo_qwen_hidden.store.read.reader import Store

PREFIX = "drift"


def measure(
    store: Store,
    *,
    step: int,
    reference: int = 0,
    hook_points: Iterable[str] | None = None,
    max_norm: float = MAX_NORM,
    labels: Labels | None = None,
) -> dict[str, float]:
    """What ``step`` of a store's probe set is against ``reference``, under names such as ``drift/cosine/resid_post@3``:
    at each hook point every field of ``change.Change``, and, where there are labels, ``accuracy`` and ``baseline`` of a
    linear probe.

    Args:
        hook_points: names, by default all of the store. max_norm: see ``change.Change``. labels: what the probe tells
            apart, such as ``labels.repeated_tokens(ProbeSet(store), reference)``.

    Raises:
        StoreError: the store lacks a probe set, a step or a hook point, or the steps hold states of other tokens.
        DataError: a probe cannot be trained on these labels.
    """
    probe = ProbeSet(store)
    found: dict[str, float] = {}
    for point in probe.hook_points(hook_points):
        values = asdict(change(probe, point, step=step, reference=reference, max_norm=max_norm))
        if labels is not None:
            values |= asdict(probe_accuracy(probe, point, step=step, labels=labels))
        found |= {f"{PREFIX}/{name}/{point}": value for name, value in values.items()}
    return found
