"""Bytes: of a rank's weights, of its activations, of the store. Integers from integers.

Megatron's column- and row-parallel linears and the vocabulary-parallel embedding are cut over tp; norms are whole on
every rank. The output layer is never allocated.
"""

from dataclasses import dataclass

MLP_ROWS = 512
"""Rows that an MLP takes at a time on a CPU."""


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of a Qwen2 decoder, by Hugging Face's names; ``head_dim`` is the size of one attention head."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int


def layer_parameters(shape: DecoderShape, tp: int) -> int:
    """Parameters of one decoder layer on one rank: QKV with bias, projection, gate, up, down, two norms."""
    qkv = (shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim // tp
    projection = shape.num_heads * shape.head_dim // tp
    ffn = shape.ffn_hidden_size // tp
    return qkv * (shape.hidden_size + 1) + (projection + 3 * ffn) * shape.hidden_size + 2 * shape.hidden_size


def padded_vocab(shape: DecoderShape, tp: int) -> int:
    """Rows of the embedding table over all tp ranks, a multiple of tp."""
    return -(-shape.vocab_size // tp) * tp


def weight_bytes(shape: DecoderShape, *, layers: int, tp: int, first: bool, final_norm: bool, itemsize: int) -> int:
    """Bytes of the weights of one rank of a stage of ``layers`` layers."""
    parameters = layers * layer_parameters(shape, tp)
    if first:
        parameters += padded_vocab(shape, tp) // tp * shape.hidden_size
    if final_norm:
        parameters += shape.hidden_size
    return parameters * itemsize


def activation_bytes(
    shape: DecoderShape, *, tokens: int, tp: int, itemsize: int, sp: bool = False, mlp_rows: int | None = None
) -> int:
    """Upper estimate of what one layer has alive at its widest, for ``tokens`` (C x B) tokens on a rank.

    States are the residual stream, its norm, and outputs that are still referred to: five beside gate-and-up and the
    three steps from there to the gated activation, of which kernels that fuse them have fewer. Under ``sp`` the five
    are of the rank's own tokens, and three more are of all: what is gathered, and what is summed before and after.

    ``mlp_rows``: the MLP takes so many rows at a time, on a CPU. Then the widest is attention, with four states,
    queries before and after their turn, keys, values and twice what it gives; or the MLP, with six states, gate-and-up
    of its rows, and where half precision is widened to fp32 the layer's weights in that.
    """
    inner = shape.ffn_hidden_size // tp
    states = 3 + -(-5 // tp) if sp else 5
    if mlp_rows is None:
        return tokens * (states * shape.hidden_size + 5 * inner) * itemsize
    heads = (4 * shape.num_heads + 3 * shape.num_query_groups) * shape.head_dim // tp
    attention = tokens * ((states - 1) * shape.hidden_size + heads) * itemsize
    mlp = tokens * (states + 1) * shape.hidden_size * itemsize + min(tokens, mlp_rows) * 2 * inner * 4
    if itemsize < 4:
        mlp += (3 * inner * shape.hidden_size + min(tokens, mlp_rows) * 2 * inner) * 4
    return max(attention, mlp)


def gathered_bytes(shape: DecoderShape, *, tokens: int, tp: int, itemsize: int) -> int:
    """Upper estimate of keys and values of all ``tokens`` (S x B) on each rank of a cp group: as they come, in the
    order of the sequence, in what attention makes of them, and what gloo has not let go of yet: its threads were seen
    to hold two exchanges more when the cores were busy."""
    return 8 * tokens * 2 * (shape.num_query_groups // tp) * shape.head_dim * itemsize


def travelling_bytes(shape: DecoderShape, *, tokens: int, itemsize: int) -> int:
    """Upper estimate of what a pipeline stage holds of states that come and go, for ``tokens`` tokens of a microbatch:
    the one that came, the next, and three that are sent or about to be."""
    return 5 * tokens * shape.hidden_size * itemsize
