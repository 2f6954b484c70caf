"""TransformerLens: ``run_with_cache`` with the names that are wanted and ``stop_at_layer``.

Its ``TransformerBridge``, the faster of its two models (``HookedTransformer`` took 1.0 to 1.3 times as long), without
the attention weights that ``run_with_cache`` asks for otherwise. It cannot stop after the last layer: there it computes
the logits of one token of each document.
"""

from collections.abc import Sequence

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from benchmarks.rivals.rival import DTYPES, SortedRival
from benchmarks.work import Work


class Lens(SortedRival):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        tokenizer = AutoTokenizer.from_pretrained(work.model)
        dtype = DTYPES[work.dtype]
        self.model = TransformerBridge.boot_transformers(
            str(work.model), device="cpu", dtype=dtype, tokenizer=tokenizer
        )

    def residuals(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
        stop = layers[-1] + 1
        _, cache = self.model.run_with_cache(
            ids,
            names_filter=names,
            stop_at_layer=stop if stop < self.model.cfg.n_layers else None,
            return_type=None,
            output_attentions=False,
            use_cache=False,
            logits_to_keep=1,
        )
        return [cache[name] for name in names]

    def norm(self, states: Tensor) -> Tensor:
        normed: Tensor = self.model.original_model.model.norm(states)
        return normed
