"""Bytes of a rank in training. Integers from integers.

Activations are counted as Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count them, and Megatron's
``theoretical_memory_usage.py`` after them: every tensor that the backward pass needs, once, until it has been there.
Where they have a GELU of 4 H, attention that keeps its weights, and dropout, a Qwen2 in ``model/spec.py`` has a gated
MLP, queries of more heads than keys, attention that is computed again in the backward pass (Dao et al. 2022, arXiv
2205.14135), and no dropout.

T: tokens of a microbatch on this rank, H: hidden size, Q: units of its query heads, K: of its key heads, F: inner units
of its MLP.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.plan.footprint import DecoderShape, layer_parameters, padded_vocab
from nemo_qwen_hidden.plan.shapes import state_width
from nemo_qwen_hidden.plan.stages import points_of_stage
from nemo_qwen_hidden.plan.training import most_held
from nemo_qwen_hidden.topology import Topology

WIDE = 4  # bytes of fp32, in which sums, norms and the optimizer work
QUEUE_BYTES = 256 * 2**20
"""Of captured states that wait for the disk, beyond which training waits; and a single step may be larger."""
STEPS_AHEAD = 2
"""Captured steps that wait or are written, beside the one that is captured."""

_CUT_IN_A_LAYER = 6  # weights that tp cuts: QKV and its bias, projection, gate, up, down; beside two norms
_LORA_WEIGHTS = 8  # of a layer: two for each of its linears
_PIECE_BYTES = 1700  # that torch.save and the list of pieces take for each piece of a tensor; seen


@dataclass(frozen=True, kw_only=True)
class Training:
    """What memory depends on.

    stages: layer indices of each. tied: the output layer is the embedding table. itemsize: bytes of a number that is
    computed with. tokens: of one microbatch (micro_batch_size x seq_length). microbatches: of a replica in a step.
    lora_dim: of the LoRA of every linear, which alone is trained then; None: all weights are. recompute,
    recompute_layers: as ``config.TrainSettings``. points: that are captured. captured_rows: of each store, tokens of
    its largest step, of all ranks; captured_itemsize: bytes of a number as it waits for the disk.
    """

    shape: DecoderShape
    topology: Topology
    stages: Sequence[range]
    tied: bool
    itemsize: int
    seq_length: int
    micro_batch_size: int
    microbatches: int
    recompute: str
    recompute_layers: int
    lora_dim: int | None = None
    points: tuple[HookPoint, ...] = ()
    captured_rows: Sequence[int] = ()
    captured_itemsize: int = WIDE

    @property
    def tokens(self) -> int:
        """Of a microbatch, on a rank: those of its part of the sequence axis."""
        return self.micro_batch_size * self.seq_length // self.topology.cp

    @property
    def own_tokens(self) -> int:
        """Those of them between blocks, where sequence parallelism splits them."""
        return self.tokens // self.topology.tp if self.topology.sp else self.tokens


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of a rank. parameters: how many numbers, with those of a LoRA; trained: how many are. gradients: in fp32,
    where they are summed. optimizer: Adam's two moments, and in half precision the weights in fp32. activations: what
    microbatches hold between forward and backward at most, and what a backward pass makes of it on the way. states:
    captured, of one step. queue: captured, that may wait for the disk, at most."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    saving: int
    states: int
    queue: int

    @property
    def total(self) -> int:
        """The most that is there at once."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + max(self.activations, self.saving) + self.states + self.queue


def optimizer_bytes(parameters: int, itemsize: int) -> int:
    """Adam's two moments in fp32; in half precision the weights in fp32, too (Megatron's
    ``Float16OptimizerWithFloat16Params``)."""
    return parameters * WIDE * (2 if itemsize == WIDE else 3)


def checkpoint_bytes(shape: DecoderShape, *, tied: bool, tp: int, itemsize: int, lora_dim: int | None = None) -> int:
    """Of weights and optimizer of a whole model in Megatron's distributed form, each number once; of a LoRA those of
    the adapter alone."""
    kinds = 3 if itemsize == WIDE else 4
    if lora_dim is None:
        parameters = model_parameters(shape, tied=tied)
        tables = 1 if tied else 2
        pieces = kinds * (shape.num_layers * (_CUT_IN_A_LAYER * tp + 2) + tables * tp + 1)
    else:
        parameters = shape.num_layers * lora_parameters(shape, lora_dim, 1)
        pieces = kinds * shape.num_layers * _LORA_WEIGHTS * tp
    return parameters * itemsize + optimizer_bytes(parameters, itemsize) + pieces * _PIECE_BYTES


def model_parameters(shape: DecoderShape, *, tied: bool) -> int:
    """Of a whole model with its output layer."""
    tables = padded_vocab(shape, 1) * shape.hidden_size * (1 if tied else 2)
    return shape.num_layers * layer_parameters(shape, 1) + shape.hidden_size + tables


def lora_parameters(shape: DecoderShape, dim: int, tp: int) -> int:
    """Of the LoRA of one layer on one rank: A [dim, in] and B [out, dim] of QKV, projection, gate with up, and down,
    all of which tp cuts (``ParallelLinearAdapter`` of NeMo 2.7.3, ``collections/llm/peft/utils.py``)."""
    hidden, inner, queries = shape.hidden_size, shape.ffn_hidden_size, shape.num_heads * shape.head_dim
    qkv = queries + 2 * shape.num_query_groups * shape.head_dim
    return dim * ((hidden + qkv) + (queries + hidden) + (hidden + 2 * inner) + (inner + hidden)) // tp


def _layers(run: Training, rank: int) -> int:
    return sum(len(run.stages[stage]) for stage in range(rank, len(run.stages), run.topology.pp))


def rank_parameters(run: Training, rank: int) -> int:
    """Of pipeline rank ``rank``. A tied output layer on another rank than the embedding is a copy of it."""
    shape, tp, stages = run.shape, run.topology.tp, run.stages
    own = range(rank, len(stages), run.topology.pp)
    table = padded_vocab(shape, tp) // tp * shape.hidden_size
    first, last = 0 in own, len(stages) - 1 in own
    tables = first + last - (first and last and run.tied)
    return _layers(run, rank) * layer_parameters(shape, tp) + tables * table + last * shape.hidden_size


def layer_bytes(run: Training) -> int:
    """What a layer keeps of one microbatch for the backward pass, of which nothing is computed again.

    2 norms     [T, H] each: what comes in and what is multiplied with the weight, in fp32
    2 linears   [T, H] each: what comes in
    attention   queries and what they give [T, Q], keys [T, K], values with all three as they come [T, Q + 2 K]
    output      [T, Q] what comes in
    MLP         [T, F]: gate, up (twice), silu of the gate, what comes into the second linear
    angles      cosines and sines, of queries and keys, in fp32
    LoRA        [T, dim] what comes into B, of four linears
    """
    shape, tp, cp = run.shape, run.topology.tp, run.topology.cp
    queries, keys = (heads * shape.head_dim // tp for heads in (shape.num_heads, shape.num_query_groups))
    inner = shape.ffn_hidden_size // tp
    wide = run.own_tokens * 4 * shape.hidden_size * WIDE
    own = run.own_tokens * 2 * shape.hidden_size
    if cp == 1:
        attention = run.tokens * (4 * queries + 3 * keys)
    else:
        masked = (2 * cp + 1) * (run.seq_length // (2 * cp)) ** 2
        attention = run.tokens * (3 * queries + 2 * cp * keys) + masked
    if run.recompute == "selective":
        attention -= run.tokens * queries
    angles = 4 * run.seq_length // cp * shape.head_dim
    lora = run.tokens * 4 * (run.lora_dim or 0)
    return wide + (own + attention + run.tokens * 5 * inner + angles + lora) * run.itemsize


def chunk_bytes(run: Training, stage: int) -> int:
    """What a stage keeps of one microbatch between its forward and its backward pass."""
    layers, whole, state = (
        len(run.stages[stage]),
        layer_bytes(run),
        run.own_tokens * run.shape.hidden_size * run.itemsize,
    )
    if run.recompute == "uniform":
        kept = -(-layers // run.recompute_layers) * state
    elif run.recompute == "block":
        again = min(layers, run.recompute_layers)
        kept = again * state + (layers - again) * whole
    else:
        kept = layers * whole
    return kept + (_head_bytes(run) if stage == len(run.stages) - 1 else 0)


def held_bytes(run: Training, rank: int) -> int:
    """What all microbatches on the way keep on a rank at most, and what is computed again in the backward pass beyond
    what that has let go of by then: the output layer's part, and the layers after a block."""
    stages = range(rank, len(run.stages), run.topology.pp)
    held = most_held(run.topology, rank, run.microbatches, [chunk_bytes(run, stage) for stage in stages])
    layers, whole = max(len(run.stages[stage]) for stage in stages), layer_bytes(run)
    gone = _head_bytes(run) if rank == run.topology.pp - 1 else 0
    again = 0
    if run.recompute == "uniform":
        again = min(layers, run.recompute_layers) * whole
    elif run.recompute == "block":
        again, gone = min(layers, 1) * whole, gone + max(0, layers - run.recompute_layers) * whole
    return held + max(0, again - gone)


def _passing_bytes(run: Training, rank: int) -> int:
    """What a backward pass makes while all is held: on the last stage, where it begins, the gradient of the output
    layer if that is trained; else those of gate, of up and of their product."""
    tp, shape = run.topology.tp, run.shape
    inner = 3 * run.tokens * shape.ffn_hidden_size // tp
    last = rank == run.topology.pp - 1 and run.lora_dim is None
    table = padded_vocab(shape, tp) // tp * shape.hidden_size if last else 0
    return max(inner, table) * run.itemsize


def _adam_bytes(run: Training) -> int:
    """What a step of Adam makes of the largest weight, when no activation is left: twice its size in fp32."""
    shape, tp = run.shape, run.topology.tp
    rows = (
        2 * shape.ffn_hidden_size
        if run.lora_dim is not None
        else max(padded_vocab(shape, tp), 2 * shape.ffn_hidden_size)
    )
    return 2 * (rows // tp * (run.lora_dim or shape.hidden_size)) * WIDE


def _saving_bytes(run: Training, rank: int) -> int:
    """Copies of gate and up, which are one weight of Megatron's and two of a checkpoint's: of the weights and of all
    that the optimizer keeps for them. A piece of a larger tensor is copied before it is written, all of them before the
    first (``dist_checkpointing/strategies/filesystem_async.py`` of megatron-core 0.16.1, ``_clone_if_needed``)."""
    columns = run.lora_dim or run.shape.hidden_size
    gated = _layers(run, rank) * 2 * run.shape.ffn_hidden_size // run.topology.tp * columns
    return gated * run.itemsize + optimizer_bytes(gated, run.itemsize)


def _head_bytes(run: Training) -> int:
    """Final norm, output layer and loss: logits in fp32, which become their own gradient."""
    shape = run.shape
    logits = run.tokens * (padded_vocab(shape, run.topology.tp) // run.topology.tp) * WIDE
    return run.own_tokens * shape.hidden_size * (2 * WIDE + run.itemsize) + logits


def _states_bytes(run: Training, rank: int) -> list[int]:
    """Captured of the largest step of each store on a rank, which keeps its stripe of its replica's tokens."""
    own, topology = range(rank, len(run.stages), run.topology.pp), run.topology
    points = [point for stage in own for point in points_of_stage(run.points, run.stages, stage)]
    width = sum(state_width(point, run.shape, keys=run.seq_length) for point in points)
    stripes = topology.tp * topology.cp * topology.dp
    return [-(-rows // stripes) * width * run.captured_itemsize for rows in run.captured_rows]


def rank_memory(run: Training, rank: int) -> RankMemory:
    """Of a rank at ``rank`` of the pipeline."""
    dim = run.lora_dim
    lora = 0 if dim is None else _layers(run, rank) * lora_parameters(run.shape, dim, run.topology.tp)
    parameters = rank_parameters(run, rank) + lora
    trained = parameters if dim is None else lora
    states = _states_bytes(run, rank)
    return RankMemory(
        parameters=parameters,
        trained=trained,
        weights=parameters * run.itemsize,
        gradients=trained * WIDE,
        optimizer=optimizer_bytes(trained, run.itemsize),
        activations=max(held_bytes(run, rank) + _passing_bytes(run, rank), _adam_bytes(run)),
        saving=_saving_bytes(run, rank),
        states=max(states, default=0),
        queue=sum(min(STEPS_AHEAD * each, max(QUEUE_BYTES, each)) for each in states),
    )
