"""The doctor on ranks: what a live model gives in a layout, and whether runs and replicas of it agree.

Every rank calls everything here together. C: tokens of the slice that a rank has of the sequence axis, B: sequences,
R: rows, W: width of a state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate

import torch
from torch import Tensor

from nemo_qwen_hidden.capture.pipeline import Pipeline
from nemo_qwen_hidden.capture.rows import view_of
from nemo_qwen_hidden.capture.sites import visit_site
from nemo_qwen_hidden.capture.taps import Capture, LocalSlice
from nemo_qwen_hidden.doctor.observation import Observation, Passage
from nemo_qwen_hidden.doctor.report import FAILED, OK, SKIPPED, Check, Finding, Place
from nemo_qwen_hidden.hookpoint import ATTN_OUT, EMBED, MLP_OUT, RESIDUAL_SITES, HookPoint, by_depth
from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
from nemo_qwen_hidden.parallel.agree import all_values, gather_values
from nemo_qwen_hidden.plan.microbatches import Batching, Microbatch, plan
from nemo_qwen_hidden.plan.slices import Run
from nemo_qwen_hidden.plan.stages import stage_of
from nemo_qwen_hidden.topology import Place as RankPlace

RUNS, TP_REPLICAS, DP_REPLICAS = "two runs agree", "tp replicas agree", "dp replicas agree"
_Spot = tuple[int, int]
"""A place that can be ordered: the number of the hook point in the order of the model, and the row."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What ranks have found. observation: on rank 0 alone. checks, findings: the same on every rank."""

    observation: Observation | None
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]


def examine(
    model: Qwen2HiddenModel,
    passages: Sequence[Passage],
    points: Sequence[HookPoint],
    *,
    compute: str,
    batch_tokens: int,
    packing: bool,
    progressed: Callable[[], None] = lambda: None,
) -> Examined:
    """Runs ``passages`` twice on every replica. Collective over all ranks.

    compute: the dtype of the model. progressed: is called after each microbatch.
    """
    lengths = [len(passage) for passage in passages]
    topology = model.groups.topology
    batching = Batching(
        max_tokens=max(lengths),
        batch_tokens=batch_tokens,
        packing=packing,
        multiple_of=topology.sequence_multiple,
        segment_multiple=topology.segment_multiple,
    )
    microbatches = list(plan(lengths, batching))
    token_ids = torch.cat([passage.token_ids for passage in passages])
    first = _run(model, microbatches, token_ids, points, progressed, replicas=True)
    second = _run(model, microbatches, token_ids, points, progressed, replicas=False)
    compared = _Compared(model, passages, points)
    checks = [
        compared.runs(first, second),
        compared.tp_replicas(first),
        compared.dp_replicas(first),
    ]
    states = _gathered(model, first, points, rows=sum(lengths))
    observation = None
    if states:
        observation = Observation(passages=tuple(passages), states=states, compute=compute, stored=compute)
    return Examined(observation=observation, checks=tuple(checks), findings=tuple(compared.findings))


@dataclass
class _Kept:
    """Of one run on one rank. slices: what it answers for, in order. replicas: what it has at the residual sites,
    [C, B, W] of each microbatch, where the other tp ranks have the same."""

    slices: dict[HookPoint, list[LocalSlice]] = field(default_factory=dict)
    replicas: dict[HookPoint, list[Tensor]] = field(default_factory=dict)
    microbatches: Sequence[Microbatch] = ()

    def sink(self, piece: LocalSlice) -> None:
        self.slices.setdefault(piece.hook_point, []).append(piece)

    def rows(self, point: HookPoint) -> tuple[Tensor, Tensor]:
        """Row numbers int64 [n] and values fp32 [n, W] of a hook point."""
        pieces = self.slices[point]
        rows = torch.tensor([row for piece in pieces for row in _rows(piece.runs)], dtype=torch.int64)
        return rows, torch.cat([piece.values.float().cpu() for piece in pieces])


def _rows(runs: Sequence[Run]) -> Iterator[int]:
    for run in runs:
        yield from range(run.first_row, run.first_row + run.length)


def _run(
    model: Qwen2HiddenModel,
    microbatches: Sequence[Microbatch],
    token_ids: Tensor,
    points: Sequence[HookPoint],
    progressed: Callable[[], None],
    *,
    replicas: bool,
) -> _Kept:
    """All microbatches on this replica, whichever it is."""
    kept, topology = _Kept(microbatches=microbatches), model.groups.topology
    pipeline = Pipeline(model.chunks, model.groups, stages=model.stages, capture=Capture(points=tuple(points)))
    whole = replicas and topology.tp > 1 and not topology.sp
    watched = [point for point in points if point.site in RESIDUAL_SITES] if whole else []
    with _watching(model, watched, kept):
        pipeline.run(
            microbatches,
            lambda first, length: token_ids[first : first + length],
            kept.sink,
            lambda microbatch: progressed(),
        )
    return kept


@contextmanager
def _watching(model: Qwen2HiddenModel, points: Sequence[HookPoint], kept: _Kept) -> Iterator[None]:
    """Copies all that this rank has at ``points``, beside the taps, which copy its stripe alone."""
    with ExitStack() as stack:
        own = dict(zip(model.groups.place.stages, model.chunks, strict=True))
        for point in points:
            chunk = own.get(stage_of(point, model.stages))
            if chunk is None:
                continue

            def visit(state: Tensor, _given: Tensor, point: HookPoint = point) -> None:
                kept.replicas.setdefault(point, []).append(state.detach().float().cpu().clone())

            stack.callback(visit_site(chunk, point, visit).remove)
        yield


class _Compared:
    """Holds runs and replicas together, bit by bit; agreement is collective over all ranks."""

    def __init__(self, model: Qwen2HiddenModel, passages: Sequence[Passage], points: Sequence[HookPoint]) -> None:
        self._model, self._groups = model, model.groups
        self._passages = passages
        self._points = by_depth(points, model.config.num_layers)
        self.findings: list[Finding] = []

    def runs(self, one: _Kept, other: _Kept) -> Check:
        """Whether two runs gave the same on every rank."""
        differing = []
        for point in self._points:
            if point in one.slices:
                rows, values = one.rows(point)
                differing += self._differing(point, rows, values, other.rows(point)[1])
        place = self._first(differing)
        if place is None:
            return Check(name=RUNS, status=OK, detail=f"bit-equal at {len(self._points)} hook points")
        says = f"two runs of the same tokens differ, first at {place}: dropout, or something else random, is on"
        self.findings.append(Finding(fault="dropout", says=says))
        return Check(name=RUNS, status=FAILED, detail="they differ", place=place)

    def tp_replicas(self, run: _Kept) -> Check:
        """Whether the tp ranks have the same residual stream, where each has all of it."""
        topology = self._groups.topology
        if topology.tp == 1:
            return Check(name=TP_REPLICAS, status=SKIPPED, detail="tp is 1")
        if topology.sp:
            return Check(
                name=TP_REPLICAS, status=SKIPPED, detail="with sequence parallelism no rank has another's tokens"
            )
        watched = [point for point in self._points if point in run.replicas]
        states = {point: torch.cat([_flat(each) for each in run.replicas[point]]) for point in watched}
        return self._replicas(TP_REPLICAS, "tensor parallel ranks", states, self._watched_rows(run), _of_tp)

    def dp_replicas(self, run: _Kept) -> Check:
        """Whether the replicas, which have run the same documents, have the same states."""
        if self._groups.topology.dp == 1:
            return Check(name=DP_REPLICAS, status=SKIPPED, detail="dp is 1")
        held = {point: run.rows(point) for point in self._points if point in run.slices}
        rows = {point: rows for point, (rows, _) in held.items()}
        states = {point: values for point, (_, values) in held.items()}
        return self._replicas(DP_REPLICAS, "data parallel replicas", states, rows, _of_dp)

    def _replicas(
        self,
        name: str,
        who: str,
        states: Mapping[HookPoint, Tensor],
        rows: Mapping[HookPoint, Tensor],
        key: Callable[[RankPlace], tuple[int, ...]],
    ) -> Check:
        """key: what the places of ranks that should agree have in common."""
        place = self._groups.place
        mine = key(place), {point: sha256(values.numpy().tobytes()).digest() for point, values in states.items()}
        everyone = [hashes for found, hashes in all_values(mine, self._groups) if found == mine[0]]
        wrong = [point for point in states if len({hashes.get(point) for hashes in everyone}) > 1]
        first = min((self._number(point) for point in wrong), default=None)
        firsts = [number for number in all_values(first, self._groups) if number is not None]
        if not firsts:
            count = len(set().union(*all_values(set(states), self._groups)))
            return Check(name=name, status=OK, detail=f"bit-equal at {count} hook points")
        point = self._points[min(firsts)]
        sent = key(place), states.get(point), rows.get(point)
        shared = [(values, which) for found, values, which in all_values(sent, self._groups) if found == mine[0]]
        differing: list[_Spot] = []
        if point in states:
            for values, _ in shared[1:]:
                differing += self._differing(point, rows[point], shared[0][0], values)
        spot = self._first(differing)
        self.findings.append(self._disagreement(who, point, spot))
        return Check(name=name, status=FAILED, detail="they differ", place=spot)

    def _disagreement(self, who: str, point: HookPoint, place: Place | None) -> Finding:
        if point.site in (ATTN_OUT, MLP_OUT, EMBED) and who.startswith("tensor"):
            says = f"{who} have different {point.site}, from what was the same before: it was not summed over tp"
            return Finding(fault="not-summed", says=says, evidence=(f"first at {place}",))
        says = f"{who} have different states for the same tokens, first at {place}: other weights, or other settings"
        return Finding(fault="replicas-differ", says=says)

    def _watched_rows(self, run: _Kept) -> Mapping[HookPoint, Tensor]:
        """The row of each token that this rank has, -1 for padding; the same at every point."""
        place, found = self._groups.place, []
        for microbatch in run.microbatches:
            view = view_of(microbatch, place.topology, cp=place.cp, tp=place.tp, choice=None)
            tokens = microbatch.tokens // place.topology.cp
            rows = torch.full((tokens, microbatch.sequences), -1, dtype=torch.int64)
            for each in view.all_runs:
                wanted = torch.arange(each.first_row, each.first_row + each.length)
                rows[each.index : each.index + each.length, each.sequence] = wanted
            found.append(rows.flatten())
        return dict.fromkeys(run.replicas, torch.cat(found))

    def _differing(self, point: HookPoint, rows: Tensor, one: Tensor, other: Tensor) -> list[_Spot]:
        off = ((one != other) & ~(one.isnan() & other.isnan())).any(dim=1) & (rows >= 0)
        return [(self._number(point), int(row)) for row in rows[off].tolist()]

    def _number(self, point: HookPoint) -> int:
        return self._points.index(point)

    def _first(self, differing: Sequence[_Spot]) -> Place | None:
        """The first place on any rank. Collective over all ranks."""
        spots = [spot for spot in all_values(min(differing, default=None), self._groups) if spot is not None]
        if not spots:
            return None
        number, row = min(spots)
        starts = list(accumulate((len(passage) for passage in self._passages), initial=0))
        index = max(place for place, start in enumerate(starts[:-1]) if start <= row)
        passage = self._passages[index]
        token = passage.first_token + row - starts[index]
        return Place(hook_point=str(self._points[number]), document=passage.document, token=token)


def _of_tp(place: RankPlace) -> tuple[int, ...]:
    return place.pp, place.dp, place.cp


def _of_dp(place: RankPlace) -> tuple[int, ...]:
    return place.pp, place.tp, place.cp


def _flat(state_CBW: Tensor) -> Tensor:
    return state_CBW.flatten(0, 1).flatten(1)


def _gathered(
    model: Qwen2HiddenModel, run: _Kept, points: Sequence[HookPoint], *, rows: int
) -> dict[HookPoint, Tensor]:
    """fp32 [R, W] of every hook point of the first replica, on rank 0; NaN where no rank answered for a row."""
    whole: dict[HookPoint, Tensor] = {}
    for point in by_depth(points, model.config.num_layers):
        mine = run.rows(point) if model.groups.place.dp == 0 and point in run.slices else None
        for piece in gather_values(mine, model.groups):
            if piece is not None:
                where, values = piece
                whole.setdefault(point, torch.full((rows, values.shape[1]), torch.nan))[where] = values
    return whole
