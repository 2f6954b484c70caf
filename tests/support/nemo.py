"""NeMo 2 checkpoints for tests, written by NeMo's own Trainer, and NeMo's own LoRA."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.topology import Topology
from tests.support.models import Batch
from tests.support.training import Job, Outcome, pieces_in, pieces_of, trainer_of

DIM, ALPHA = 4, 6


def trained(rank: Rank, job: Job, folder: Path, to: Path, target_modules: Sequence[str] = ()) -> Outcome:
    """Trains a job from the weights of ``folder``, and saves it as NeMo's ``ModelCheckpoint`` does (its state, then the
    context); with ``target_modules`` a LoRA of these. Returns the weights that this rank ends with."""
    from nemo.collections.llm.peft import LoRA
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
    from nemo.lightning.io.pl import TrainerContext

    from nemo_qwen_hidden.parallel.host import training_on_host

    torch.manual_seed(5)
    callbacks = [
        LoRA(target_modules=list(target_modules), dim=DIM, alpha=ALPHA, lora_B_init_method="normal")
        for _ in target_modules[:1]
    ]
    with trainer_of(rank, job, folder, callbacks) as (trainer, model, data):
        if callbacks:
            model.model_transform, model.__io__.model_transform = callbacks[0], callbacks[0].__io__
        trainer.fit(model, data)
        with training_on_host():
            trainer.save_checkpoint(to)
        if rank.rank == 0:
            TrainerContext.from_trainer(trainer).io_dump(ckpt_to_context_subdir(to), yaml_attrs=["model"])
        dist.barrier()
        return Outcome(pieces=pieces_of(trainer))


def converted(rank: Rank, source: Path, target: Path, adapter: str | None = None) -> Any:
    """What ``convert`` says that it did; here, because NeMo is imported already."""
    from nemo_qwen_hidden.conversion import convert

    return convert(str(source), str(target), adapter=adapter)


def importers(rank: Rank, source: Path, folder: Path) -> tuple[dict[str, tuple[str, bool]], bool]:
    """Of our importer with one thing as in NeMo's: what it raises, or what the first norm then begins with; and whether
    it leaves its process groups behind. After these and ``import_huggingface``, whether the stand-ins are gone."""
    from nemo.collections.llm.gpt.model.qwen2 import HFQwen2Importer

    from nemo_qwen_hidden.parallel.host import _forward_stand_ins, _training_stand_ins, training_on_host
    from nemo_qwen_hidden.training.importer import QwenImporter, _without_groups_afterwards, import_huggingface
    from nemo_qwen_hidden.training.ranks import as_if_torchrun

    replaced = [(owner, name) for owner, name, _ in (*_forward_stand_ins(), *_training_stand_ins())]
    before = [getattr(owner, name) for owner, name in replaced]
    import_huggingface(source, folder / "ours")
    found = {"ours": (_first_norm(folder / "ours"), dist.is_initialized())}
    for name in ("nemo_setup", "config", "convert_state"):
        importer = type("Importer", (QwenImporter,), {name: getattr(HFQwen2Importer, name)})(str(source))
        importer.rendezvous, importer.folder = rank.rendezvous.with_name(name), folder / f"tokenizer-{name}"
        with as_if_torchrun(rank), _without_groups_afterwards(), training_on_host():
            try:
                importer.apply(folder / name)
                found[name] = _first_norm(folder / name), dist.is_initialized()
            except (AssertionError, ImportError) as error:
                found[name] = type(error).__name__, dist.is_initialized()
    return found, before == [getattr(owner, name) for owner, name in replaced]


def _first_norm(folder: Path) -> str:
    from nemo_qwen_hidden.checkpoint.architecture import read_architecture
    from nemo_qwen_hidden.checkpoint.nemo_tensors import NemoTensors

    tensors = NemoTensors.of(folder, read_architecture(folder).shape)
    return str(float(tensors.read("layers.0.input_layernorm.weight")[0]))


def imported_by_nemo(rank: Rank, source: Path, target: Path) -> None:
    """``llm.import_ckpt`` of NeMo itself, once our importer is registered."""
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.qwen2 import Qwen2Config, Qwen2Model

    from nemo_qwen_hidden.training.importer import register_importer
    from nemo_qwen_hidden.training.ranks import as_if_torchrun

    register_importer()
    with mock.patch.dict("os.environ"), as_if_torchrun(rank):
        llm.import_ckpt(
            Qwen2Model(Qwen2Config(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128)),
            f"hf://{source}",
            output_path=target,
        )


def written(rank: Rank, work: Sequence[tuple[Any, ...]]) -> list[Outcome]:
    """``trained`` several times on the same ranks."""
    return [trained(rank, *each) for each in work]


def reopened(rank: Rank, topology: Topology, folders: Sequence[Path]) -> list[Outcome]:
    """This rank's part of the weights of each of some checkpoints, output layer included."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    found = []
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        for folder in folders:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, output_layer=True)
            state = {n: chunk.sharded_state_dict(prefix="module.") for n, chunk in enumerate(model.chunks)}
            found.append(Outcome(pieces=pieces_in(state)))
        dist.barrier()
    return found


def lora_applied(rank: Rank, folder: Path, adapter: Path, batch: Batch, points: Sequence[str]) -> Any:
    """States of a model with NeMo's LoRA modules put in, filled from the adapter's checkpoint by Megatron."""
    from megatron.core import dist_checkpointing
    from nemo.collections.llm import fn
    from nemo.collections.llm.peft import LoRA

    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.parallel.host import training_on_host

    torch.set_num_threads(1)
    with process_groups(Topology(), rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        model = Qwen2HiddenModel.from_pretrained(folder, groups=groups)
        with training_on_host():
            fn.walk(model.module, LoRA(dim=DIM, alpha=ALPHA, lora_B_init_method="normal").transform)
            everything = model.module.sharded_state_dict(prefix="module.module.")
            wanted = {name: entry for name, entry in everything.items() if ".adapter." in name and "_extra" not in name}
            loaded = dist_checkpointing.load(wanted, str(adapter / "weights"))
        state = {name.removeprefix("module.module."): loaded[name] for name in wanted}
        assert not model.module.load_state_dict(state, strict=False).unexpected_keys
        model.eval()
        states = model.hidden_states(batch.input_ids, lengths=batch.lengths, hook_points=list(points))
    return {point: values.numpy() for point, values in states.items()}


def merged(
    rank: Rank, topology: Topology, folders: Sequence[Path], adapter: Path, batch: Batch, points: Sequence[str]
) -> Any:
    """States of each of some models with the adapter merged in, in fp32, and their parameters in bf16."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel
    from nemo_qwen_hidden.parallel.groups import process_groups

    torch.set_num_threads(1)
    found = []
    with process_groups(topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        for folder in folders:
            model = Qwen2HiddenModel.from_pretrained(folder, groups=groups, adapter=adapter)
            states = model.hidden_states(batch.input_ids, lengths=batch.lengths, hook_points=list(points))
            narrow = Qwen2HiddenModel.from_pretrained(folder, groups=groups, adapter=adapter, dtype="bf16")
            rounded = {name: value.detach().float().numpy() for name, value in narrow.named_parameters()}
            wide = {name: value.detach().numpy() for name, value in model.named_parameters()}
            found.append(({point: values.numpy() for point, values in states.items()}, wide, rounded))
        dist.barrier()
    return found


def alone(rank: Rank, folder: Path, batch: Batch) -> Any:
    """``final_norm`` by a process that has made no process groups."""
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel

    torch.set_num_threads(1)
    model = Qwen2HiddenModel.from_pretrained(folder)
    states = model.hidden_states(batch.input_ids, lengths=batch.lengths, hook_points=["final_norm"])
    return next(iter(states.values())).numpy()
