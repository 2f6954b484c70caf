"""transformers: the model without its output layer, cut after the deepest layer that is wanted, its own SDPA attention,
and forward hooks on the layers that are wanted.

Padding is on the right, where causal attention needs no mask; without one SDPA takes its fastest path.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import AutoModel

from benchmarks.rivals.rival import DTYPES, SortedRival
from benchmarks.work import Work


class Transformers(SortedRival):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.model = AutoModel.from_pretrained(work.model, dtype=DTYPES[work.dtype], attn_implementation="sdpa").eval()
        self.layers, self.norm_module = self.model.layers, self.model.norm
        self.model.norm = nn.Identity()  # for the tokens that are wanted it is called by itself

    def residuals(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        found: list[Tensor] = []
        hooks = [self.layers[n].register_forward_hook(lambda _module, _inputs, out: found.append(out)) for n in layers]
        self.model.layers = self.layers[: layers[-1] + 1]
        try:
            self.model(ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
            self.model.layers = self.layers
        return found

    def norm(self, states: Tensor) -> Tensor:
        normed: Tensor = self.norm_module(states)
        return normed
