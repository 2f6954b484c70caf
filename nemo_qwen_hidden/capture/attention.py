"""Attention probabilities, computed anew for the heads and rows that are asked for; the model's own attention never
forms them.

C: tokens that a context-parallel rank has, S: tokens of the sequence axis, B: sequences, G: query groups of this tp
rank, D: size of a head, n: rows kept (of all tp ranks), A: asked heads of this tp rank, K: keys, the width of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from nemo_qwen_hidden.capture.exchange import gather_tokens
from nemo_qwen_hidden.capture.rows import View
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.plan.slices import Run, spans_of
from nemo_qwen_hidden.topology import Place


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """heads: those asked for, ascending, of ``num_heads``. keys: numbers in each head's row; the row of a token at
    position p of its document (or window) has its weights on positions 0 to p there, then zeros."""

    heads: tuple[int, ...] = ()
    num_heads: int = 0
    keys: int = 0

    def of_rank(self, tp: int, parts: int) -> list[int]:
        """The asked heads that a tp rank has, counted among its own."""
        size = self.num_heads // parts
        return [head - tp * size for head in self.heads if head // size == tp]

    def widths(self, parts: int) -> list[int]:
        """Numbers of one token's state that each tp rank computes."""
        return [len(self.of_rank(tp, parts)) * self.keys for tp in range(parts)]


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Queries of kept rows [n, A, D], all keys of this rank [C, B, G, D], and which group each asked head reads."""

    view: View
    asked: AttentionWeights
    query: Tensor
    key: Tensor
    groups: Sequence[int]

    @classmethod
    def of(
        cls, view: View, query_CBND: Tensor, key_CBGD: Tensor, asked: AttentionWeights, place: Place
    ) -> "AttentionInputs":
        heads = asked.of_rank(place.tp, place.topology.tp)
        runs = [run for stripe in view.stripes for run in stripe]
        rows = [query_CBND[run.index : run.index + run.length, run.sequence][_offsets(run)] for run in runs]
        query = torch.cat([query_CBND.new_empty(0, *query_CBND.shape[2:]), *rows])[:, heads]
        per_group = query_CBND.shape[2] // key_CBGD.shape[2]
        groups = [head // per_group for head in heads]
        return cls(view=view, asked=asked, query=query, key=key_CBGD.clone(), groups=groups)

    def weights(self, process_groups: ProcessGroups) -> Tensor:
        """softmax(q k / sqrt(D)) over the keys that each row sees, [n, A * K], zeros behind. Collective over cp."""
        microbatch, parts = self.view.microbatch, process_groups.topology.cp
        spans = [span for part in range(parts) for span in spans_of(microbatch, part=part, parts=parts)]
        key_SBGD = gather_tokens(self.key, spans, process_groups.cp)
        found = self.query.new_zeros(len(self.query), len(self.groups), self.asked.keys)
        places, number_of = list(microbatch.places()), microbatch.segment_numbers()
        done = 0
        for run in (run for stripe in self.view.stripes for run in stripe):
            segment, sequence, offset = places[number_of(run.first_row)]
            last_seen = run.first_row - segment.first_row + torch.arange(run.length)[_offsets(run)]
            keys = key_SBGD[offset : offset + int(last_seen[-1]) + 1, sequence][:, list(self.groups)]
            hidden = torch.arange(len(keys)) > last_seen[:, None]
            queries = self.query[done : done + run.kept]
            # in float64, so that what is asked for beside a row does not show in its bits
            scores = torch.einsum("nad,kad->nak", queries.double(), keys.double()) / sqrt(keys.shape[-1])
            scores = scores.masked_fill(hidden[:, None].to(scores.device), -torch.inf)
            found[done : done + run.kept, :, : len(keys)] = scores.softmax(dim=-1).to(found.dtype)
            done += run.kept
        return found.flatten(1)


def _offsets(run: Run) -> list[int] | slice:
    return slice(None) if run.picked is None else list(run.picked)
