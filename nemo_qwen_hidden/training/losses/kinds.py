"""The losses on hidden states that come with the package.

Each is a sum over the tokens that a rank has, over a count that every rank knows (``training.losses.state_loss``).

B: sequences, S: tokens of a sequence in the batch, C: those of them that this rank has at the residual sites, H: hidden
size, K: classes, n: chosen tokens of this rank. ``docs/losses.md`` has the formulas.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_qwen_hidden.checkpoint.tensors import SCORE, TensorFiles
from nemo_qwen_hidden.errors import CheckpointError, ConfigError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.read.reader import Store, open_store
from nemo_qwen_hidden.training.losses.heads import Linear, Medusa
from nemo_qwen_hidden.training.losses.state_loss import StateLoss, Tokens

IGNORED = -100
"""A label that is left out, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True, kw_only=True)
class Distillation(StateLoss):
    """Distance to the states of a teacher in a store.

    Attributes:
        store: its path, the same on all ranks.
        teacher: the hook point there; None: the same name as here.
        rows: the batch has under this key, int64 [B, S], the row of the store that each token is compared with; -1:
            none. ``tokens.document_rows`` of the store says which a document has.
        distance: ``mse``, the mean over the hidden axis of the squared difference, or ``cosine``, 1 - cos.
        project: compare a trained linear map of the state; None: where the teacher has another width.
        seed: of the map's first weights.
    """

    store: str
    teacher: str | None = None
    rows: str = "teacher_rows"
    distance: str = "mse"
    project: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.distance not in ("mse", "cosine"):
            raise ConfigError(f"distance of loss {self.name}", "must be mse or cosine", self.distance)

    def head(self, config: TransformerConfig) -> MegatronModule | None:
        """A linear map without bias, [teacher's width, H], where one is needed.

        Raises:
            ConfigError: the widths differ and ``project`` is False.
        """
        width = _opened(self.store)[self.teacher or self.point(config.num_layers)].shape[1]
        project = width != config.hidden_size if self.project is None else self.project
        if width != config.hidden_size and not project:
            rule = f"must not be false where the teacher's states ({width}) are not as wide as {config.hidden_size}"
            raise ConfigError(f"project of loss {self.name}", rule, False)
        return Linear(config, config.hidden_size, width, bias=False, seed=self.seed) if project else None

    def part(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module | None) -> Tensor:
        rows_BS = tokens[self.rows]
        rows_CB = tokens.own(rows_BS)
        chosen = rows_CB >= 0
        state_nH = state_CBH[chosen.to(state_CBH.device)].float()
        if head is not None:
            state_nH = head(state_nH)
        target_nH = self._target(rows_CB[chosen], state_nH, tokens.point)
        if self.distance == "mse":
            of_token = (state_nH - target_nH).square().mean(dim=-1)
        else:
            of_token = 1 - F.cosine_similarity(state_nH, target_nH, dim=-1)
        return of_token.sum() / (rows_BS >= 0).sum().clamp(min=1)

    def _target(self, rows: Tensor, like: Tensor, point: HookPoint) -> Tensor:
        if not len(rows):
            return torch.zeros_like(like)
        store = _opened(self.store)
        states = store.state_of_rows(rows.cpu().numpy())
        return store[self.teacher or point][states].to(like)


@lru_cache
def _opened(path: str) -> Store:
    return open_store(path)


@dataclass(frozen=True, kw_only=True)
class ValueHead(StateLoss):
    """A scalar for each token, as of a critic: the squared difference to what the batch has under ``targets``, float
    [B, S]. Tokens are left out where ``mask``, bool or 0 and 1 [B, S], is 0; None: none are. detach: the state is not
    moved, the head alone is trained."""

    targets: str = "values"
    mask: str | None = None
    detach: bool = False
    seed: int = 0

    def head(self, config: TransformerConfig) -> MegatronModule:
        """[1, H], with a bias."""
        return Linear(config, config.hidden_size, 1, bias=True, seed=self.seed)

    def part(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module | None) -> Tensor:
        assert head is not None
        targets_BS = tokens[self.targets]
        mask_BS = torch.ones_like(targets_BS) if self.mask is None else tokens[self.mask].to(targets_BS.dtype)
        values_CB = head(state_CBH.detach() if self.detach else state_CBH).squeeze(-1)
        targets_CB, mask_CB = (tokens.own(each).to(values_CB) for each in (targets_BS, mask_BS))
        total: Tensor = ((values_CB - targets_CB).square() * mask_CB).sum()
        return total / mask_BS.sum().clamp(min=1).to(total)


@dataclass(frozen=True, kw_only=True)
class LinearProbe(StateLoss):
    """Which of K classes each token is in: cross-entropy with what the batch has under ``labels``, int64 [B, S], where
    that is not -100. detach: the state is not moved, the probe alone is trained."""

    classes: int
    labels: str = "token_classes"
    detach: bool = False
    seed: int = 0

    def head(self, config: TransformerConfig) -> MegatronModule:
        """[K, H], with a bias."""
        return Linear(config, config.hidden_size, self.classes, bias=True, seed=self.seed)

    def part(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module | None) -> Tensor:
        assert head is not None
        labels_BS = tokens[self.labels]
        logits_CBK = head(state_CBH.detach() if self.detach else state_CBH)
        labels_CB = tokens.own(labels_BS).to(logits_CBK.device)
        total = F.cross_entropy(logits_CBK.flatten(0, 1), labels_CB.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (labels_BS != IGNORED).sum().clamp(min=1).to(total)


SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
REGRESSION = "regression"


@dataclass(frozen=True, kw_only=True)
class SequenceClassifier(StateLoss):
    """Transformers' ``Qwen2ForSequenceClassification`` (4.57): ``score``, without bias, of the final-normed state of
    each sequence's last token that is not padding.

    Attributes:
        classes: K, its ``num_labels``.
        labels: the batch has under this key int64 [B] (-100: left out); for ``regression`` and
            ``multi_label_classification`` float [B, K], or [B] where K is 1.
        problem: transformers' ``problem_type``.
        last: the batch has under this key, int64 [B], the position of each sequence's last token. None: the rightmost
            token that is not ``pad_token_id``, as in transformers. Qwen's padding is a token that texts may end in,
            so positions are the safer of the two.
        weights: a Hugging Face folder with a ``score.weight`` to begin with; None: random, from ``seed``.
    """

    hook_point: str = "final_norm"
    classes: int
    labels: str = "classes"
    problem: str = SINGLE_LABEL
    last: str | None = None
    pad_token_id: int | None = None
    weights: str | None = None
    seed: int = 0

    measured: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __post_init__(self) -> None:
        if self.problem not in (SINGLE_LABEL, MULTI_LABEL, REGRESSION):
            rule = f"must be {SINGLE_LABEL}, {MULTI_LABEL} or {REGRESSION}"
            raise ConfigError(f"problem of loss {self.name}", rule, self.problem)
        if (self.last is None) == (self.pad_token_id is None):
            rule = "must be given, or else `pad_token_id`, and not both"
            raise ConfigError(f"last of loss {self.name}", rule, self.last)

    def head(self, config: TransformerConfig) -> MegatronModule:
        """[K, H]."""
        head = Linear(config, config.hidden_size, self.classes, bias=False, seed=self.seed)
        if self.weights is not None:
            score = _read_score(self.weights)
            if score.shape != head.weight.shape:
                rule = f"must have shape {list(head.weight.shape)}"
                raise CheckpointError(f"{self.weights}: {SCORE}", rule, list(score.shape))
            with torch.no_grad():
                head.weight.copy_(score)
        return head

    def last_positions(self, tokens: Tokens) -> Tensor:
        """int64 [B]."""
        if self.last is not None:
            return tokens[self.last]
        kept_BS = tokens["tokens"].ne(torch.tensor(self.pad_token_id))
        return (torch.arange(kept_BS.shape[1], device=kept_BS.device) * kept_BS).argmax(dim=1)

    def logits(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module) -> tuple[Tensor, Tensor]:
        """fp32 [n, K] of the sequences whose last token this rank has, and int64 [n], which they are."""
        index, sequences = tokens.find(self.last_positions(tokens))
        chosen_nH = state_CBH[index.to(state_CBH.device), sequences.to(state_CBH.device)]
        return head(chosen_nH), sequences

    def part(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module | None) -> Tensor:
        assert head is not None
        logits_nK, sequences = self.logits(state_CBH, tokens, head)
        labels_B = tokens[self.labels]
        labels_n = labels_B[sequences.to(labels_B.device)].to(logits_nK.device)
        if self.problem == SINGLE_LABEL:
            total = F.cross_entropy(logits_nK, labels_n, ignore_index=IGNORED, reduction="sum")
            return total / (labels_B != IGNORED).sum().clamp(min=1).to(total)
        labels_nK = labels_n.reshape(logits_nK.shape).float()
        if self.problem == REGRESSION:
            total = F.mse_loss(logits_nK, labels_nK, reduction="sum")
        else:
            total = F.binary_cross_entropy_with_logits(logits_nK, labels_nK, reduction="sum")
        return total / (len(labels_B) * self.classes)

    def measures(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module | None) -> dict[str, Tensor]:
        """accuracy: the share of sequences whose class has the largest logit; of other problems nothing."""
        if self.problem != SINGLE_LABEL:
            return {}
        assert head is not None
        logits_nK, sequences = self.logits(state_CBH, tokens, head)
        labels_B = tokens[self.labels]
        right = (logits_nK.argmax(dim=1).to(labels_B.device) == labels_B[sequences.to(labels_B.device)]).sum()
        return {"accuracy": right.float() / (labels_B != IGNORED).sum().clamp(min=1)}


def _read_score(folder: str) -> Tensor:
    files = TensorFiles.of(Path(folder))
    if SCORE not in files.files:
        raise CheckpointError("weights", f"must be a folder with the tensor `{SCORE}`", folder)
    with files.reader() as reader:
        return reader.read(SCORE)


@dataclass(frozen=True, kw_only=True)
class MedusaHeads(StateLoss):
    """Medusa (https://arxiv.org/abs/2401.10774, Medusa-1 and 2): head k of ``heads`` predicts, from the state of token
    t, token t + 1 + k, with softmax(W2 (SiLU(W1 h) + h)); the model itself predicts token t + 1. The vocabulary is
    split over the tp ranks.

    Attributes:
        vocab_size: of the model, without padding.
        weights: a Hugging Face folder whose output layer each head begins with; None: random, from ``seed``.
        decay: the loss of head k weighs decay ** k (the paper's 0.8).
        labels, mask: the batch has under these keys token t + 1, int64 [B, S], and whether it counts, float [B, S].
        detach: the state is not moved (Medusa-1).
    """

    hook_point: str = "final_norm"
    heads: int
    vocab_size: int
    weights: str | None = None
    decay: float = 0.8
    labels: str = "labels"
    mask: str = "loss_mask"
    detach: bool = False
    seed: int = 0

    every_tp_rank_has_all: ClassVar[bool] = True

    def head(self, config: TransformerConfig) -> MegatronModule:
        """Of each of the heads W1 [H, H], zero at first, with a bias, and W2 [vocabulary, H]."""
        return Medusa(config, heads=self.heads, vocab_size=self.vocab_size, seed=self.seed, weights=self.weights)

    def part(self, state_CBH: Tensor, tokens: Tokens, head: nn.Module | None) -> Tensor:
        assert isinstance(head, Medusa)
        labels_BS, mask_BS = tokens[self.labels], tokens[self.mask].float()
        state_CBH = state_CBH.detach() if self.detach else state_CBH
        total = state_CBH.new_zeros((), dtype=torch.float32)
        for ahead in range(1, self.heads + 1):
            later_BS, counts_BS = _earlier(labels_BS, ahead), _earlier(mask_BS, ahead)
            losses_TB = head(state_CBH, tokens.own_of_tp_group(later_BS).to(state_CBH.device), ahead - 1)
            counts_TB = tokens.own_of_tp_group(counts_BS).to(losses_TB)
            mean = (losses_TB * counts_TB).sum() / counts_BS.sum().clamp(min=1).to(losses_TB)
            total = total + self.decay**ahead * mean
        return total


def _earlier(values_BS: Tensor, tokens: int) -> Tensor:
    """At each token what is ``tokens`` later; 0 where there is nothing."""
    moved = torch.zeros_like(values_BS)
    if tokens < values_BS.shape[1]:
        moved[:, :-tokens] = values_BS[:, tokens:]
    return moved
