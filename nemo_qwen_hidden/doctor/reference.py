"""The same model in transformers, run as it is or with changes. T: tokens of a sequence, R: rows, H: hidden.

Its modules are hooked, never rewritten: what transformers computes is the truth. Documents run one at a time, alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_qwen_hidden.checkpoint.adapter import Adapter, MergedReader
from nemo_qwen_hidden.checkpoint.architecture import read_architecture
from nemo_qwen_hidden.checkpoint.nemo_context import is_nemo
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.checkpoint.tensors import Reader, expected_shapes
from nemo_qwen_hidden.doctor.algebra import FinalNorm
from nemo_qwen_hidden.doctor.observation import Observation
from nemo_qwen_hidden.doctor.rounding import TORCH_DTYPES
from nemo_qwen_hidden.hookpoint import (
    ATTN_OUT,
    EMBED,
    FINAL_NORM,
    MLP_ACT,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    ROT_K,
    ROT_Q,
    HookPoint,
    K,
    Q,
    V,
    Z,
)

NO_ROW = -1


def _of_tensors(folder: Path, adapter: Path | None, dtype: torch.dtype) -> Any:
    """transformers' model with the weights of a folder that it cannot read, or cannot read as they were run."""
    from transformers import Qwen2Config, Qwen2Model

    architecture = read_architecture(folder)
    weights = open_weights(folder, architecture)
    with weights.reader() as files:
        reader: Reader = files if adapter is None else MergedReader(files, Adapter.of(adapter, architecture.shape))
        tensors = {name: reader.read(name).to(dtype) for name in expected_shapes(architecture.shape)}
    config = Qwen2Config(**architecture.config)
    return Qwen2Model.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Feed:
    """One sequence as the model gets it.

    token_ids, positions: int64 [T]. rows: int64 [T], the row that each token's state is taken for, or ``NO_ROW``.
    visible: bool [T, T], which tokens (second axis) each token sees; None for all up to itself.
    """

    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    visible: Tensor | None = None


class Edits:
    """Changes to a model that are undone on leaving; a context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> "Edits":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute."""
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Gives a parameter other values of the same shape."""
        self.attribute(parameter, "data", value.to(parameter.dtype).reshape(parameter.shape))

    def hook(self, handle: Any) -> None:
        """A hook that has been registered already."""
        self._stack.callback(handle.remove)


Edit = Callable[["Reference", Edits], None]
Refeed = Callable[[Sequence[Feed]], Sequence[Feed]]


class Reference:
    """A Qwen2 of transformers. Not safe to use from threads."""

    def __init__(self, folder: Path, *, dtype: str = "fp32", adapter: Path | None = None) -> None:
        """adapter: of a LoRA, whose changes are in the weights that were run."""
        if adapter is None and not is_nemo(folder):
            from transformers import AutoModel

            model = AutoModel.from_pretrained(folder, dtype=TORCH_DTYPES[dtype], local_files_only=True)
        else:
            model = _of_tensors(folder, adapter, TORCH_DTYPES[dtype])
        self.model = model.eval()
        self.config = self.model.config

    @property
    def layers(self) -> Any:
        """Decoder layers, a ``ModuleList``."""
        return self.model.layers

    @property
    def blocks(self) -> list[Any]:
        """The decoder layers that have weights: not what stands in the place of one that was left out."""
        return [layer for layer in self.layers if hasattr(layer, "input_layernorm")]

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def norm(self) -> FinalNorm:
        """The final norm."""
        return FinalNorm(weight=self.model.norm.weight.detach().float(), epsilon=self.model.norm.variance_epsilon)

    def run(
        self,
        observation: Observation,
        points: Iterable[HookPoint],
        *,
        edits: Sequence[Edit] = (),
        feeds: Sequence[Refeed] = (),
        given: Mapping[int, Tensor] | None = None,
        depth: int | None = None,
    ) -> dict[HookPoint, Tensor]:
        """States fp32 [R, width] at ``points``, in that order; NaN in rows that no feed has.

        edits, feeds: changes of the model and of what it is fed, applied in order. given: for a layer index, the
        states [R, H] that it gets in place of what the layer before gave. depth: layers that are run; None for all.
        """
        wanted = tuple(points)
        sequences: Sequence[Feed] = plain_feeds(observation)
        for refeed in feeds:
            sequences = refeed(sequences)
        found: dict[HookPoint, Tensor] = {}
        with torch.no_grad(), Edits() as made:
            for edit in edits:
                edit(self, made)
            if depth is not None:
                made.attribute(self.model, "layers", self.layers[:depth])
                made.attribute(self.config, "num_hidden_layers", len(self.layers))
            for feed in sequences:
                for point, values in self._states(feed, wanted, given or {}, changed=bool(edits or feeds)).items():
                    whole = found.setdefault(point, torch.full((observation.rows, values.shape[1]), torch.nan))
                    taken = feed.rows != NO_ROW
                    whole[feed.rows[taken]] = values[taken]
        return {point: found[point] for point in wanted if point in found}

    def _states(
        self, feed: Feed, wanted: Sequence[HookPoint], given: Mapping[int, Tensor], *, changed: bool
    ) -> dict[HookPoint, Tensor]:
        """Unless something is changed, positions and mask are left to transformers, which takes four times as long."""
        inputs: dict[str, Any] = {"input_ids": feed.token_ids[None], "use_cache": False}
        if changed:
            visible = feed.visible if feed.visible is not None else causal(len(feed.token_ids))
            mask = torch.zeros(visible.shape, dtype=self.model.dtype)
            inputs["attention_mask"] = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[None, None]
            inputs["position_ids"] = feed.positions[None]
        with _Tap(self, frozenset(wanted)) as tap:
            for layer, states in given.items():
                if layer < len(self.layers):
                    tap.replace_input(self.layers[layer], states[feed.rows].to(self.model.dtype)[None])
            self.model(**inputs)
        return {point: values.float().reshape(len(feed.token_ids), -1) for point, values in tap.found.items()}


@dataclass
class _Tap:
    """Forward hooks that keep what passes the wanted hook points, while entered."""

    reference: Reference
    wanted: frozenset[HookPoint]
    found: dict[HookPoint, Tensor] = field(default_factory=dict)

    def __enter__(self) -> "_Tap":
        self._handles: list[Any] = []
        model = self.reference.model
        self._after(model.embed_tokens, HookPoint(EMBED))
        self._after(model.norm, HookPoint(FINAL_NORM))
        for index, layer in enumerate(self.reference.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for site, module in ((Q, attention.q_proj), (K, attention.k_proj), (V, attention.v_proj)):
                self._after(module, HookPoint(site, index))
            self._before(attention.o_proj, HookPoint(Z, index))
            self._after(attention.o_proj, HookPoint(ATTN_OUT, index))
            self._before(layer.post_attention_layernorm, HookPoint(RESID_MID, index))
            self._before(mlp.down_proj, HookPoint(MLP_ACT, index))
            self._after(mlp, HookPoint(MLP_OUT, index))
            self._before(layer, HookPoint(RESID_PRE, index))
            self._after(layer, HookPoint(RESID_POST, index))
            self._rotated(attention, index)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def replace_input(self, layer: nn.Module, states: Tensor) -> None:
        """Gives ``layer`` other hidden states [1, T, H]."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})

        self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def _after(self, module: nn.Module, point: HookPoint) -> None:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            self.found[point] = output[0] if isinstance(output, tuple) else output

        if point in self.wanted:
            self._handles.append(module.register_forward_hook(hook))

    def _before(self, module: nn.Module, point: HookPoint) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.found[point] = args[0] if args else kwargs["hidden_states"]

        if point in self.wanted:
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _rotated(self, attention: Any, index: int) -> None:
        """Queries and keys after the rotary embedding, by transformers' own function from what its projections gave."""
        points = {HookPoint(ROT_Q, index): attention.q_proj, HookPoint(ROT_K, index): attention.k_proj}
        if self.wanted.isdisjoint(points):
            return
        from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

        tables: list[tuple[Tensor, Tensor]] = []

        def keep(_module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
            tables[:] = [kwargs["position_embeddings"]]

        def hook_of(point: HookPoint) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
                heads = output.unflatten(-1, (-1, self.reference.head_dim)).transpose(1, 2)
                rotated, _ = apply_rotary_pos_emb(heads, heads, *tables[0])
                self.found[point] = rotated.transpose(1, 2).flatten(2)

            return hook

        self._handles.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
        for point, module in points.items():
            if point in self.wanted:
                self._handles.append(module.register_forward_hook(hook_of(point)))


def plain_feeds(observation: Observation) -> tuple[Feed, ...]:
    """Each passage alone."""
    return tuple(
        Feed(
            token_ids=passage.token_ids,
            positions=torch.arange(len(passage)),
            rows=torch.arange(start, start + len(passage)),
        )
        for passage, start in zip(observation.passages, observation.starts, strict=False)
        if len(passage)
    )


def causal(tokens: int) -> Tensor:
    """bool [tokens, tokens]: each token sees itself and those before it."""
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def zigzag_places(tokens: int, ranks: int) -> Tensor:
    """The places of a sequence as ``ranks`` context parallel ranks have them, rank after rank: rank r has the chunks r
    and 2 * ranks - 1 - r of 2 * ranks. Places from ``tokens`` on are padding, which fills the last chunks."""
    size = max(1, -(-tokens // (2 * ranks)))
    chunks = [chunk for rank in range(ranks) for chunk in (rank, 2 * ranks - 1 - rank)]
    return torch.cat([torch.arange(chunk * size, (chunk + 1) * size) for chunk in chunks])
