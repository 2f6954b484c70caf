"""nnsight: a trace of the model without its output layer, stopped after the deepest layer that is wanted."""

from collections.abc import Sequence

from nnsight import NNsight
from torch import Tensor
from transformers import AutoModel

from benchmarks.rivals.rival import DTYPES, SortedRival
from benchmarks.work import Work


class Trace(SortedRival):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.inner = AutoModel.from_pretrained(work.model, dtype=DTYPES[work.dtype], attn_implementation="sdpa").eval()
        self.model = NNsight(self.inner)

    def residuals(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        model = self.model
        with model.trace(ids, use_cache=False) as tracer:
            found = list().save()
            for layer in layers:
                found.append(model.layers[layer].output)
            tracer.stop()
        return list(found)

    def norm(self, states: Tensor) -> Tensor:
        normed: Tensor = self.inner.norm(states)
        return normed
