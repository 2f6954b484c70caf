"""What a linear probe reads out of the states of one step: how well they tell classes apart.

Closed-form ridge regression on one-hot classes, of states that are standardised over the documents trained on; what the
probe says is the class with the largest value. Predictions are those of scikit-learn's ``RidgeClassifier`` behind a
``StandardScaler`` with ``alpha = RIDGE * n``.

Legend: n states trained on, H numbers in each, C classes. Memory: two H x H matrices in float64, and two blocks.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_qwen_hidden.drift.labels import UNLABELLED, Labels
from nemo_qwen_hidden.drift.probe_set import ProbeSet
from nemo_qwen_hidden.errors import DataError

RIDGE = 0.01
"""What is added to the diagonal of the correlation matrix of the states."""

HELD_OUT = 0.3
SEED = 0

_Floats = NDArray[np.float64]
_Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which states a probe is trained on, and which are held out: no document is in both. int64, numbers of states,
    all of which have labels."""

    train: _Numbers
    held_out: _Numbers


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """accuracy: the part of the held-out states whose class the probe says; NaN where states hold NaN or infinite
    values. baseline: that of saying the most frequent class of the training states always."""

    accuracy: float
    baseline: float


def split(labels: Labels, *, held_out: float = HELD_OUT, seed: int = SEED) -> Split:
    """A part ``held_out`` of the documents that have labels, drawn with ``seed``, rounded up, against the others.

    Raises:
        DataError: fewer than two documents have labels, or those to train on have one class alone.
    """
    found = _drawn(labels, held_out, seed)
    fault = _fault(labels, found)
    if fault is not None:
        raise fault
    return found


def can_be_told(labels: Labels) -> bool:
    """Whether ``split`` raises nothing."""
    return _fault(labels, _drawn(labels, HELD_OUT, SEED)) is None


def _drawn(labels: Labels, held_out: float, seed: int) -> Split:
    labelled = np.flatnonzero(labels.of_states != UNLABELLED)
    documents = np.unique(labels.documents[labelled])
    drawn = np.random.default_rng(seed).permutation(documents)[: math.ceil(held_out * len(documents))]
    held = np.isin(labels.documents[labelled], drawn)
    return Split(train=labelled[~held], held_out=labelled[held])


def _fault(labels: Labels, found: Split) -> DataError | None:
    documents = len(np.unique(labels.documents[found.train]))
    if not documents or not len(found.held_out):
        rule = "must be of two documents or more, some to train a probe on and others to look at"
        return DataError("labels", rule, documents or len(np.unique(labels.documents[found.held_out])))
    classes = np.unique(labels.of_states[found.train])
    if len(classes) < 2:
        rule = f"must have two classes or more in the {documents} documents that a probe is trained on"
        return DataError("labels", rule, [labels.classes[number] for number in classes])
    return None


def probe_accuracy(
    probe: ProbeSet, hook_point: str, *, step: int, labels: Labels, parts: Split | None = None, ridge: float = RIDGE
) -> Accuracy:
    """Trains a probe on the states of one step at one hook point, and counts how often it is right.

    Args:
        parts: by default those of ``split(labels)``. ridge: see ``RIDGE``.

    Raises:
        DataError: as ``split``, or the labels are not one for each state.
    """
    if len(labels.of_states) != probe.size(step):
        raise DataError("labels", f"must be one for each of {probe.size(step)} states", len(labels.of_states))
    parts = parts or split(labels)
    right = _right(probe, hook_point, step, labels, parts, ridge)
    counts = np.bincount(labels.of_states[parts.train], minlength=len(labels.classes))
    baseline = float((labels.of_states[parts.held_out] == counts.argmax()).mean())
    return Accuracy(accuracy=right / len(parts.held_out), baseline=baseline)


def _right(probe: ProbeSet, hook_point: str, step: int, labels: Labels, parts: Split, ridge: float) -> float:
    """How many of the held-out states the probe is right about."""
    width, classes = probe.width(hook_point), len(labels.classes)
    sum_H, squares_HH, with_HC = np.zeros(width), np.zeros((width, width)), np.zeros((width, classes))
    for block in probe.blocks(hook_point, parts.train):
        x_nH = probe.values(step, hook_point, block).astype(np.float64)
        sum_H += x_nH.sum(axis=0)
        with np.errstate(invalid="ignore"):  # 0 * inf
            squares_HH += x_nH.T @ x_nH
            with_HC += x_nH.T @ np.eye(classes)[labels.of_states[block]]
    if not np.isfinite(squares_HH).all():
        return float("nan")
    count = len(parts.train)
    mean_H, part_C = sum_H / count, np.bincount(labels.of_states[parts.train], minlength=classes) / count
    covariance_HH = squares_HH / count - np.outer(mean_H, mean_H)
    scale_H = np.sqrt(np.maximum(np.diag(covariance_HH), 0))
    scale_H[scale_H <= 1e-7 * np.sqrt(np.diag(squares_HH) / count)] = 1.0  # equal in all states, up to rounding
    correlation_HH = covariance_HH / np.outer(scale_H, scale_H)
    target_HC = (with_HC / count - np.outer(mean_H, part_C)) / scale_H[:, None]
    weight_HC = np.linalg.solve(correlation_HH + ridge * np.eye(width), target_HC) / scale_H[:, None]
    right = 0
    for block in probe.blocks(hook_point, parts.held_out):
        said = (probe.values(step, hook_point, block).astype(np.float64) - mean_H) @ weight_HC + part_C
        if not np.isfinite(said).all():
            return float("nan")
        right += int((said.argmax(axis=1) == labels.of_states[block]).sum())
    return float(right)
