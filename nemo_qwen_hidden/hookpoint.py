"""Hook points: where in the decoder a hidden state is taken, and what other systems call the same place.

Sites carry TransformerLens' names. Layer indices are 0-based over the whole model. S_n is the residual stream
after n layers (S_0 the embeddings, L the number of layers).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemo_qwen_hidden.errors import ConfigError

EMBED, FINAL_NORM = "embed", "final_norm"
RESID_PRE, RESID_MID, RESID_POST = "resid_pre", "resid_mid", "resid_post"
Q, K, V, ROT_Q, ROT_K, Z = "q", "k", "v", "rot_q", "rot_k", "z"
ATTN_WEIGHTS, ATTN_OUT, MLP_ACT, MLP_OUT = "attn_weights", "attn_out", "mlp_act", "mlp_out"
LAYERLESS_SITES = (EMBED, FINAL_NORM)
# in the order in which a layer computes them
LAYER_SITES = (RESID_PRE, Q, K, V, ROT_Q, ROT_K, ATTN_WEIGHTS, Z, ATTN_OUT, RESID_MID, MLP_ACT, MLP_OUT, RESID_POST)
SITES = (EMBED, *LAYER_SITES, FINAL_NORM)
# as wide as the residual stream, and whole on every tp rank
RESIDUAL_SITES = (EMBED, RESID_PRE, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST, FINAL_NORM)
# cut over the tp ranks: by attention head, by head of keys and values, or by inner unit of the MLP
HEAD_SITES = (Q, K, V, ROT_Q, ROT_K, ATTN_WEIGHTS, Z)
SPLIT_SITES = (*HEAD_SITES, MLP_ACT)

_SPEC = re.compile(r"(?P<site>[a-z_]+)(?:@(?P<layers>[-:0-9]+))?")


@dataclass(frozen=True)
class HookPoint:
    """A site at a layer index, written ``resid_post@12``; ``embed`` and ``final_norm`` have no layer."""

    site: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.site if self.layer is None else f"{self.site}@{self.layer}"

    @classmethod
    def parse(cls, text: str) -> "HookPoint":
        """One hook point as this package writes it, e.g. ``resid_post@12`` or ``embed``.

        Raises:
            ConfigError: not a known site, or a layer where none belongs, or none where one does.
        """
        match = _SPEC.fullmatch(text)
        if match and match["layers"] is None and match["site"] in LAYERLESS_SITES:
            return cls(match["site"])
        if match and match["site"] in LAYER_SITES and (match["layers"] or "").isdecimal():
            return cls(match["site"], int(match["layers"]))
        raise ConfigError("hook point", _FORMS, text)

    @property
    def normed(self) -> bool:
        """Whether the state is taken after the model's final norm."""
        return self.site == FINAL_NORM

    def depth(self, num_layers: int) -> int:
        """How many decoder layers have to run before this state exists."""
        if self.layer is not None:
            return self.layer + 1
        return 0 if self.site == EMBED else num_layers

    def huggingface_index(self, num_layers: int) -> int | None:
        """Index into Hugging Face's ``hidden_states`` tuple, or None where that tuple lacks this state.

        ``hidden_states[L]`` is taken after the final norm, so ``resid_post@(L-1)`` has no index there.
        """
        if self.site == FINAL_NORM:
            return num_layers
        if self.site not in (EMBED, RESID_PRE, RESID_POST):
            return None
        before = self.layer or 0 if self.site == RESID_PRE else self.depth(num_layers)
        return None if before == num_layers else before

    def meaning(self, num_layers: int) -> str:
        """The state in words, always with its place before or after the final norm."""
        if self.site == EMBED:
            return "token embeddings, the input of decoder layer 0; before the final norm"
        if self.site == FINAL_NORM:
            return f"output of the final RMSNorm over resid_post@{num_layers - 1}; after the final norm"
        return f"{_MEANINGS[self.site]} decoder layer {self.layer} (0-based, of {num_layers}); before the final norm"


_MEANINGS = {
    RESID_PRE: "residual stream before",
    Q: "queries with their bias, before rotary embedding, of",
    K: "keys with their bias, before rotary embedding, of",
    V: "values with their bias, of",
    ROT_Q: "queries after rotary embedding, of",
    ROT_K: "keys after rotary embedding, of",
    ATTN_WEIGHTS: "attention probabilities (after softmax) of",
    Z: "attention-weighted values, the input of the output projection, of",
    ATTN_OUT: "output of the attention block, added to the residual stream, of",
    RESID_MID: "residual stream between attention and MLP of",
    MLP_ACT: "gated activation silu(gate) * up, the input of the down projection, of",
    MLP_OUT: "output of the MLP block, added to the residual stream, of",
    RESID_POST: "residual stream after",
}

_FORMS = "must be `embed`, `final_norm`, `all`, or a site and layers, as `resid_post@i` or `resid_post@start:stop:step`"
_KNOWN = f"must be at one of the sites {', '.join(SITES)}"


def expand(
    specs: str | Iterable[str], *, num_layers: int, setting: str = "capture.hook_points"
) -> tuple[HookPoint, ...]:
    """The hook points that ``specs`` ask for, each once, ordered by the depth of the model.

    ``all`` is every ``resid_post``; layers may be negative (``resid_post@-1``) or a Python slice
    (``resid_post@0:24:6``).

    Raises:
        ConfigError: an unknown form, a layer that the model lacks, or nothing asked for; names ``setting``.
    """
    asked = [specs] if isinstance(specs, str) else list(specs)
    found = {point for spec in asked for point in _expand_one(str(spec), num_layers, setting)}
    if not found:
        raise ConfigError(setting, "must name at least one hook point", asked)
    return by_depth(found, num_layers)


def heads_of(specs: Sequence[str], num_heads: int) -> tuple[int, ...]:
    """Attention heads, ascending, each once; all where ``specs`` is empty. Each spec is a number or a Python slice.

    Raises:
        ConfigError: a head that the model lacks, or no heads.
    """
    chosen: set[int] = set()
    for spec in specs:
        if not re.fullmatch(r"-?\d+|-?\d*:-?\d*(:-?[1-9]\d*)?", spec):
            raise ConfigError("capture.heads", "must be numbers or slices such as 0:4", spec)
        if ":" in spec:
            found = range(num_heads)[slice(*(int(part) if part else None for part in spec.split(":")))]
        else:
            found = range(num_heads)[int(spec) :][:1] if -num_heads <= int(spec) < num_heads else range(0)
        if not found:
            raise ConfigError(
                "capture.heads", f"must name heads from 0 to {num_heads - 1} (or -{num_heads} to -1)", spec
            )
        chosen |= set(found)
    return tuple(sorted(chosen)) if specs else tuple(range(num_heads))


def by_depth(points: Iterable[HookPoint], num_layers: int) -> tuple[HookPoint, ...]:
    """``points`` in the order in which the model comes to them."""
    return tuple(sorted(points, key=lambda point: (point.depth(num_layers), SITES.index(point.site))))


def deepest(points: Sequence[HookPoint], num_layers: int) -> int:
    """How many decoder layers have to run for all of ``points``."""
    return max(point.depth(num_layers) for point in points)


def _expand_one(spec: str, num_layers: int, setting: str) -> list[HookPoint]:
    if spec == "all":
        return [HookPoint(RESID_POST, layer) for layer in range(num_layers)]
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(setting, _FORMS, spec)
    if match["site"] not in SITES:
        raise ConfigError(setting, _KNOWN, spec)
    site, layers = match["site"], match["layers"]
    if site in LAYERLESS_SITES:
        if layers is not None:
            raise ConfigError(setting, f"takes no layer at site `{site}`", spec)
        return [HookPoint(site)]
    if layers is None:
        raise ConfigError(setting, f"needs a layer at site `{site}`, such as `{site}@{num_layers - 1}`", spec)
    return [HookPoint(site, layer) for layer in _layers(layers, spec, num_layers, setting)]


def _layers(text: str, spec: str, num_layers: int, setting: str) -> Iterable[int]:
    parts = text.split(":")
    try:
        numbers = [int(part) if part else None for part in parts]
    except ValueError:
        raise ConfigError(setting, _FORMS, spec) from None
    if len(numbers) == 1 and numbers[0] is not None:
        layer = numbers[0]
        if not -num_layers <= layer < num_layers:
            raise ConfigError(setting, f"must name a layer from 0 to {num_layers - 1} (or -{num_layers} to -1)", spec)
        return [layer % num_layers]
    if not 2 <= len(numbers) <= 3 or (len(numbers) == 3 and numbers[2] == 0):
        raise ConfigError(setting, _FORMS, spec)
    start, stop = numbers[:2]
    if any(bound is not None and not -num_layers <= bound <= num_layers for bound in (start, stop)):
        raise ConfigError(setting, f"must stay within the model's {num_layers} layers", spec)
    chosen = range(num_layers)[slice(*numbers)]
    if not chosen:
        raise ConfigError(setting, f"must select at least one of the model's {num_layers} layers", spec)
    return chosen
