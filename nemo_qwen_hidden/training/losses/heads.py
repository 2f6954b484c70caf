"""Modules that losses on states train along with the model.

They are submodules of the Megatron chunk of the stage whose state they get, under ``state_heads``, so that DDP, the
optimizer and NeMo's checkpoints see them. H: hidden size, V: vocabulary, padded.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_qwen_hidden.checkpoint.tensors import EMBEDDING, OUTPUT, TensorFiles
from nemo_qwen_hidden.errors import CheckpointError, ConfigError
from nemo_qwen_hidden.parallel.host import device

VOCAB_MULTIPLE = 128
"""What a vocabulary is padded to, on every layout the same, so that a checkpoint of one opens in another."""


class StateHeads(MegatronModule):
    """The heads of one chunk, by the name of their loss."""


class Linear(MegatronModule):
    """A linear map in fp32, the same on each tp rank. weight: [outputs, inputs] in the model's dtype, normal with the
    model's ``init_method_std`` at first; bias: [outputs], zero.

    Under sequence parallelism each tp rank has the gradient of its own tokens; the mark on a parameter makes Megatron
    add them up (``finalize_model_grads``).
    """

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int, *, bias: bool, seed: int) -> None:
        super().__init__(config)
        self.weight = _replicated(config, _normal((outputs, inputs), config.init_method_std, seed))
        self.bias = _replicated(config, torch.zeros(outputs)) if bias else None

    def forward(self, state: Tensor) -> Tensor:
        """[..., inputs] to fp32 [..., outputs]."""
        bias = None if self.bias is None else self.bias.float()
        mapped: Tensor = F.linear(state.float(), self.weight.float(), bias)
        return mapped


class Medusa(MegatronModule):
    """Medusa's heads (https://arxiv.org/abs/2401.10774): W2 (SiLU(W1 h + b) + h).

    The paper writes no b; its code has it. W1 and b begin with zero, and W2 with the model's output layer where
    ``weights``, a Hugging Face folder, has one: each head then begins as a copy of the model's own.
    """

    def __init__(
        self, config: TransformerConfig, *, heads: int, vocab_size: int, seed: int, weights: str | None = None
    ) -> None:
        super().__init__(config)
        tp = config.tensor_model_parallel_size
        if VOCAB_MULTIPLE % tp:
            rule = f"must divide {VOCAB_MULTIPLE} where there are Medusa heads"
            raise ConfigError("tensor_model_parallel_size", rule, tp)
        self.vocab_size = vocab_size
        padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        # not in a list: of lists Megatron asks nobody how parameters are split when it saves a checkpoint
        for number in range(heads):
            head = _MedusaHead(config, padded)
            self._fill(head.output, weights, seed + number)
            self.add_module(str(number), head)

    def forward(self, state_CBH: Tensor, labels_TB: Tensor, number: int) -> Tensor:
        """Cross-entropy of head ``number``, fp32 [T, B], for the T tokens of the tp group, which under sequence
        parallelism are more than the C of this rank. Collective over the tp group."""
        head: _MedusaHead = getattr(self, str(number))
        logits_TBV = head(state_CBH)
        padding = self._columns(head.output) >= self.vocab_size
        logits_TBV = logits_TBV.masked_fill(padding.to(logits_TBV.device), -torch.inf)
        losses: Tensor = vocab_parallel_cross_entropy(logits_TBV.contiguous(), labels_TB.contiguous())
        return losses

    def _columns(self, linear: ColumnParallelLinear) -> Tensor:
        """int64 [V / tp], the tokens whose logits this rank has."""
        size: int = linear.output_size_per_partition
        first: int = linear.tp_group.rank() * size
        return torch.arange(first, first + size)

    @torch.no_grad()
    def _fill(self, linear: ColumnParallelLinear, weights: str | None, seed: int) -> None:
        columns = self._columns(linear)
        first, count = int(columns[0]), int((columns < self.vocab_size).sum())
        linear.weight.zero_()
        if weights is not None:
            linear.weight[:count].copy_(_output_rows(weights, slice(first, first + count), self.vocab_size))
            return
        std, width = self.config.init_method_std, linear.weight.shape[1]
        for row in range(count):  # by row, so that a rank draws its own part of what one rank alone would have
            linear.weight[row].copy_(_normal((width,), std, seed * 2**32 + first + row))


class _MedusaHead(MegatronModule):
    """Logits of the tokens that this tp rank has."""

    def __init__(self, config: TransformerConfig, vocab: int) -> None:
        super().__init__(config)
        self.residual = _Residual(config)
        uninitialised = copy.copy(config)
        uninitialised.perform_initialization = False
        self.output = ColumnParallelLinear(
            config.hidden_size, vocab, config=uninitialised, init_method=_never, bias=False, gather_output=False
        )
        set_tensor_model_parallel_attributes(self.output.weight, True, 0, 1)

    def forward(self, state_CBH: Tensor) -> Tensor:
        """fp32 [T, B, V / tp]."""
        logits: Tensor = self.output(self.residual(state_CBH))[0].float()
        return logits


class _Residual(MegatronModule):
    """SiLU(W1 h + b) + h, in the model's dtype."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.weight = _replicated(config, torch.zeros(config.hidden_size, config.hidden_size))
        self.bias = _replicated(config, torch.zeros(config.hidden_size))

    def forward(self, state: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        mixed: Tensor = F.silu(F.linear(state, self.weight, self.bias)) + state
        return mixed


def _replicated(config: TransformerConfig, values: Tensor) -> nn.Parameter:
    where = "cpu" if config.use_cpu_initialization else device()
    parameter = nn.Parameter(values.to(device=where, dtype=config.params_dtype))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def _normal(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Of a generator of its own: the model's weights, and everything drawn later, stay what they are without heads."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def _output_rows(folder: str, rows: slice, vocab_size: int) -> Tensor:
    """Rows of the output layer, or of the embeddings where they are the same."""
    files = TensorFiles.of(Path(folder))
    name = OUTPUT if OUTPUT in files.files else EMBEDDING
    if name not in files.files:
        raise CheckpointError("weights", f"must be a folder with the tensor `{OUTPUT}` or `{EMBEDDING}`", folder)
    with files.reader() as reader:
        found = reader.read(name, rows)
    if len(found) != rows.stop - rows.start:
        raise CheckpointError(f"{folder}: {name}", f"must have {vocab_size} rows", "fewer")
    return found


def _never(_weight: Tensor) -> None:
    raise AssertionError("initialised by another")
