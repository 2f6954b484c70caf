"""What capturing takes of a training step:

    python -m benchmarks.training_capture [--layers 8] [--hidden 512] [--tapped 4] [--turn 4] [--rounds 3]

One run of NeMo's trainer on one rank. By turns of a few steps nothing is captured, states of some layers are captured
and dropped, and they are captured and written to a store: what else the machine does then falls on all alike. The first
step of a turn is not counted, since the recorder's thread may still be writing states of the turn before; of the last
turn of a round what is left over falls so on a step that counts for nobody. Waiting for the disk counts: a step that
finds the recorder's queue full waits for it. Where the machine does other things as well, processor time, of all
threads, says more than the time of the clock.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.trials import spread
from nemo_qwen_hidden.parallel.launch import Rank, run_ranks

OFF, DROPPED, WRITTEN = "nothing captured", "captured and dropped", "written to a store"
TURNS = (OFF, DROPPED, WRITTEN)
VOCAB = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4, help="in a step")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--tapped", type=int, default=4, help="layers whose states are captured")
    parser.add_argument("--turn", type=int, default=4, help="steps of a turn that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        try:
            ((seconds, size),) = run_ranks(trained, (asked, Path(folder)), world=1, log=log)
        except Exception:
            print(log.read_text(errors="replace"))
            raise
    length = asked.turn + 1
    written = size / 1e6 / (asked.rounds * length)
    rounds = f"{asked.rounds} rounds of {asked.turn} steps"
    print(
        f"{asked.layers} layers x {asked.hidden}, {asked.sequences} x {asked.tokens} tokens a step, {asked.tapped} "
        f"layers captured ({written:.1f} MB a step), {asked.threads} threads, {rounds}"
    )
    for what, values in (("time", [clock for clock, _ in seconds]), ("processor time", [cpu for _, cpu in seconds])):
        _print(what, [values[start + 1 : start + length] for start in range(length, len(values), length)])


def _print(what: str, turns: Sequence[Sequence[float]]) -> None:
    """turns: seconds of the steps of each that count, without the turn that warms up."""
    base = turns[:: len(TURNS)]
    off = statistics.median(each for turn in base for each in turn)
    for number, name in enumerate(TURNS):
        mine = turns[number :: len(TURNS)]
        steps = [1000 * each for turn in mine for each in turn]
        more = [
            100 * (statistics.median(turn) / statistics.median(other) - 1)
            for turn, other in zip(mine, base, strict=True)
        ]
        whole = 100 * (statistics.median(steps) / 1000 / off - 1)
        print(f"{what}, {name}: {spread(steps, 0)} ms a step; {whole:+.1f} %, by round {spread(more, 1)} %")


def trained(rank: Rank, asked: Any, folder: Path) -> tuple[list[tuple[float, float]], int]:
    """Seconds of every step, by the clock and of the processor, and bytes of the store's states."""
    import lightning.pytorch as pl
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections.llm.gpt.model.qwen2 import Qwen2Model

    from nemo_qwen_hidden.model.config import configure_training
    from nemo_qwen_hidden.plan.stages import stages_of
    from nemo_qwen_hidden.store.read.reader import open_store
    from nemo_qwen_hidden.topology import Topology
    from nemo_qwen_hidden.training.data import BlockData
    from nemo_qwen_hidden.training.optimizer import MegatronOptimizer
    from nemo_qwen_hidden.training.ranks import as_if_torchrun
    from nemo_qwen_hidden.training.strategy import megatron_strategy
    from nemo_qwen_hidden.training.watch.callback import HiddenStatesCallback

    class Clock(pl.Callback):
        """The whole of a step, from one beginning to the next."""

        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.times.append((time.perf_counter(), time.process_time()))

        def on_train_end(self, *_: Any) -> None:
            self.times.append((time.perf_counter(), time.process_time()))

    torch.set_num_threads(asked.threads)
    topology, stages = Topology(), stages_of(asked.layers, pp=1)
    model_folder = saved_model(folder / "model", asked)
    config = configure_training(model_folder, topology, stages=stages, seq_length=asked.tokens)
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-4, use_distributed_optimizer=False)
    length = asked.turn + 1
    steps = length * (1 + len(TURNS) * asked.rounds)  # a turn to warm up
    points = [f"resid_post@{layer}" for layer in _spread_out(asked.tapped, asked.layers)]
    clock, store = Clock(), folder / "store"
    callbacks = [
        clock,
        HiddenStatesCallback(hook_points=points, to=_drop, steps=_steps_of(DROPPED, steps, length)),
        HiddenStatesCallback(hook_points=points, to=store, steps=_steps_of(WRITTEN, steps, length)),
    ]
    data = BlockData(
        torch.randint(0, VOCAB, (asked.sequences * 8, asked.tokens + 1)),
        samples=steps * asked.sequences,
        seq_length=asked.tokens,
        micro_batch_size=asked.sequences,
        global_batch_size=asked.sequences,
    )
    with as_if_torchrun(rank):
        trainer = nl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=megatron_strategy(topology, stages=stages, rendezvous=rank.rendezvous),
            max_steps=steps,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        trainer.fit(Qwen2Model(config, optim=MegatronOptimizer(optimizer)), data)
    seconds = [(end[0] - start[0], end[1] - start[1]) for start, end in pairwise(clock.times)]
    opened = open_store(store)
    return seconds, opened.states * len(points) * asked.hidden * 4


def _drop(states: Any) -> None:
    pass


def _steps_of(name: str, steps: int, length: int) -> list[int]:
    turn = TURNS.index(name)
    return [step for step in range(length, steps) if (step // length - 1) % len(TURNS) == turn]


def _spread_out(count: int, layers: int) -> Sequence[int]:
    return [layers * (number + 1) // count - 1 for number in range(count)]


def saved_model(folder: Path, asked: Any) -> Path:
    """A Qwen2 with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=asked.hidden,
        intermediate_size=asked.hidden * 11 // 4,
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.hidden // 64,
        num_key_value_heads=max(1, asked.hidden // 256),
        max_position_embeddings=asked.tokens,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
