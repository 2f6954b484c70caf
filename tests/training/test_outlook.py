"""What a plan of a fine-tuning run says, and what it refuses, before NeMo is imported."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_qwen_hidden.cli.finetune_plan import brief
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.config import (
    CaptureSettings,
    DataSettings,
    FinetuneSettings,
    ModelSettings,
    ParallelSettings,
    RunSettings,
    TrainSettings,
    WatchSettings,
)
from nemo_qwen_hidden.errors import ConfigError, DataError, StoreError
from nemo_qwen_hidden.training import texts
from nemo_qwen_hidden.training.job import CHECKPOINTS, FinetuningJob, prepare
from nemo_qwen_hidden.training.outlook import outline, outlook
from tests.support.models import Tiny, save_tiny, write_documents

LENGTHS = (40, 1, 100, 30, 9)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def facts(text: str) -> dict[str, str]:
    return {row[1]: row[2].strip() for row in re.finditer(r"^([a-z][a-z_. ]*?)  +(.*)$", text, re.M)}


def job_at(
    folder: Path, *, data: Path | None = None, watch: WatchSettings | None = None, **train: Any
) -> FinetuningJob:
    settings = FinetuneSettings(
        data=DataSettings(path=None if data is None else str(data)),
        train=TrainSettings(**{"seq_length": 16, "global_batch_size": 4, "validation_part": 0.3} | train),
        run=RunSettings(path=str(folder / "run")),
        capture=CaptureSettings(hook_points=("resid_post@0",)),
        watch=watch or WatchSettings(),
    )
    return prepare(settings, world=None)


def test_a_probe_set_is_looked_at_by_the_names_of_its_settings(tmp_path: Path) -> None:
    """Before anything is captured, and labels that half of the documents have are enough."""
    watch = WatchSettings(probe_store=str(tmp_path / "probes"), probe_documents=2, probe_labels="kind")
    with pytest.raises(DataError, match=r"`watch\.probe_labels` must name a field of the records in .* is 'kind'"):
        outline(job_at(tmp_path, watch=watch))
    records = [{"token_ids": [1, 2, 3], "kind": "a"}, {"token_ids": [4]}, {"token_ids": [5, 6], "kind": ["b"]}]
    data = tmp_path / "probes.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    watch = replace(watch, probe_data=str(data))
    assert list(outline(job_at(tmp_path, watch=watch)).probe) == [3, 1]
    with pytest.raises(DataError, match=r"`watch\.probe_labels` must be one for each of 2 tokens"):
        outline(job_at(tmp_path, watch=replace(watch, probe_documents=3)))
    data.write_text(json.dumps({"token_ids": [10**6]}))
    with pytest.raises(DataError, match=r"`watch\.probe_data`"):
        outline(job_at(tmp_path, watch=watch))


def test_a_lora_is_divided_over_tp(tmp_path: Path) -> None:
    settings = job_at(tmp_path).settings
    odd = replace(settings, parallel=ParallelSettings(tp=2), train=replace(settings.train, lora_dim=3))
    with pytest.raises(ConfigError, match=r"`train\.lora_dim` must be a multiple of `parallel\.tp` \(2\), but is 3"):
        prepare(odd, world=None)


def test_sequences_are_counted_document_by_document(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data.jsonl", LENGTHS)
    counts = texts.count(job_at(tmp_path, data=data, validation_part=0.4, global_batch_size=1))
    assert (counts.documents, counts.tokens, counts.held_out, counts.exact) == (5, 180, 2, True)
    assert (counts.train, counts.validation) == ((141 - 1) // 16, (39 - 1) // 16)


def test_of_large_data_a_part_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the characters of the others are counted; token ids are always exact."""
    words = "the cat sat on the mat and looked at the dog "
    lines = [{"text": words * (3 + number % 4)} for number in range(60)] + [{"token_ids": [5] * 1000}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = job_at(tmp_path, data=data)
    whole = texts.count(job)
    tokenized = 0

    def told(tokens: int) -> None:
        nonlocal tokenized
        tokenized = tokens

    monkeypatch.setattr(texts, "TOKENIZED_CHARACTERS", 1000)
    part = texts.count(job, told)
    assert whole.exact and not part.exact and part.documents == whole.documents == 61
    assert whole.tokens is not None and part.tokens is not None
    assert 0 < tokenized < whole.tokens / 4
    assert part.tokens == pytest.approx(whole.tokens, rel=0.02)
    assert part.train == pytest.approx(whole.train, rel=0.03)


def test_too_little_text_is_refused_as_the_run_would(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data.jsonl", LENGTHS)
    with pytest.raises(DataError, match=r"at least 4 sequences of `train\.seq_length` to validate with"):
        outlook(job_at(tmp_path, data=data))
    with pytest.raises(DataError, match="must hold a document more than are kept for validation"):
        outlook(job_at(tmp_path, data=data, validation_part=0.99))


def test_which_steps_are_captured_where_a_run_goes_on(tmp_path: Path) -> None:
    watch = WatchSettings(
        store=str(tmp_path / "a"), every=6, phases=("train", "validation"), probe_store=str(tmp_path / "b")
    )
    (tmp_path / "run" / CHECKPOINTS / "step=13-last").mkdir(parents=True)
    seen = outline(job_at(tmp_path, watch=watch, max_steps=40, validation_every=9, validation_batches=2))
    assert seen.first_step == 14 and list(seen.validations) == [18, 27, 36]
    steps = {each.phase: list(each.steps) for store in seen.stores for each in store.captured}
    assert steps == {"train": [18, 24, 30, 36], "validation": [18, 36], "probe": [18, 24, 30, 36]}
    assert {each.phase: each.rows for each in seen.stores[0].captured} == {"train": 4 * 16, "validation": 2 * 4 * 16}
    first, second, third = brief(seen)
    assert first == "steps 15 to 40 of 4 x 16 tokens, 4 microbatches of 1"
    assert second.startswith("tp=1 pp=1 dp=1 sp=false: layers 0 to 5, up to ")
    stores = r"at 6 steps into \S+ \([^)]+\), at 4 steps into \S+ \([^)]+\)"
    assert re.fullmatch(rf"captured: 1: resid_post@0; {stores}", third)


def test_a_run_at_its_end_has_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "run" / CHECKPOINTS / "step=39-last").mkdir(parents=True)
    phases = ("train", "validation")
    watch = WatchSettings(store=str(tmp_path / "a"), phases=phases, probe_store=str(tmp_path / "b"))
    seen = outline(job_at(tmp_path, watch=watch, max_steps=40))
    assert list(brief(seen)) == ["all 40 steps are done"]
    assert not seen.validations and [store.bytes for store in seen.stores] == [0, 0]


def test_attention_weights_are_not_captured_in_training(tmp_path: Path) -> None:
    job = job_at(tmp_path, watch=WatchSettings(store=str(tmp_path / "a")))
    asked = replace(job.settings, capture=CaptureSettings(hook_points=("attn_weights@0",)))
    with pytest.raises(ConfigError, match=r"`capture\.hook_points` must leave out attn_weights in training"):
        prepare(asked, world=None)


def test_how_many_checkpoints_there_are(tmp_path: Path) -> None:
    def kept(**train: int) -> tuple[int, int]:
        return outline(job_at(tmp_path, **train)).checkpoints

    assert kept(max_steps=10, checkpoint_every=20) == (1, 1)
    assert kept(max_steps=10, checkpoint_every=3) == (1, 2)
    assert kept(max_steps=10, checkpoint_every=3, keep_checkpoints=2) == (3, 4)
    assert kept(max_steps=10, checkpoint_every=3, keep_checkpoints=9) == (4, 5)


def test_a_disk_without_room_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the run, before anything is written; the plan says so in its table."""
    watch = WatchSettings(store=str(tmp_path / "a"), every=1)
    seen = outline(job_at(tmp_path, watch=watch))
    needed = seen.checkpoints[1] * seen.checkpoint_bytes + seen.stores[0].bytes
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=needed // 1000, f_frsize=1000))
    rule = r"must be on a disk with [0-9.]+ MB free \([0-9.]+ MB for `run.path`, [0-9.]+ MB for `watch.store`\), and"
    with pytest.raises(StoreError, match=f"`run.path` {rule}"):
        seen.check_disks()
    arguments = ["run.path=" + str(tmp_path / "run"), "watch.store=" + str(tmp_path / "a"), "watch.every=1"]
    arguments += ["train.seq_length=16", "train.global_batch_size=4", "train.validation_part=0.3"]
    arguments.append("capture.hook_points=[resid_post@0]")
    assert main(["finetune", *arguments]) == 2
    assert re.match(f"nemo-qwen-hidden: `run.path` {rule}", capfd.readouterr().err)
    assert main(["finetune", "--plan", *arguments]) == 0
    assert "no room" in facts(capfd.readouterr().out)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=needed // 1000 + 1, f_frsize=1000))
    seen.check_disks()


def test_what_the_plan_shows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [f"run.path={tmp_path}/run", "parallel=tp2_pp2", "parallel.vp=2", "train.validation_part=0.3"]
    arguments += [f"watch.store={tmp_path}/a", "watch.every=30", "capture.hook_points=[resid_post@1]"]
    assert main(["finetune", "--plan", *arguments]) == 0
    text = capfd.readouterr().out
    found = facts(text)
    assert found["run"].startswith("new; 100 steps in all, in fp32")
    assert found["layout"].startswith("tp=2 pp=2 vp=2 dp=1 sp=false: 4 ranks, layers 0 to 1, 2 to 3, 4, 5")
    assert found["step"] == "8 sequences of 256 tokens, 8 microbatches of 1"
    assert found["pipeline"] == "idles 5.9% of a step (interleaved 1F1B: (pp-1)/(vp m) = 0.0625)"
    assert found["holds"] == "24 documents, 9,066 tokens"
    assert found["training"] == "26 sequences: a pass takes 3.25 steps"
    assert found["passes"] == "30.8 of `train.max_steps`"
    assert found["validation"] == "8 documents, 9 sequences; after every 50 steps: 8 sequences"
    assert found["checkpoint"].startswith("about 18.")
    assert re.search(r"^train +4 +0 +90 +2,048 ", text, re.M)
    assert re.search(r"^0 +0 to 1, 4 +1\.\d MB", text, re.M) and re.search(r"^1 +2 to 3, 5 ", text, re.M)
    assert max(map(len, text.splitlines())) <= 80
    assert not any(tmp_path.iterdir())


def test_a_plan_imports_neither_nemo_nor_torch(tmp_path: Path) -> None:
    """Where nothing has to be tokenized: a tokenizer brings transformers, and that torch."""
    model = save_tiny(tmp_path / "model", Tiny(layers=2, groups=2, tied=True), vocab_size=384)
    data = write_documents(tmp_path / "data.jsonl", (300, 300))
    script = """
import sys
from nemo_qwen_hidden.cli.main import main
assert main(["finetune", "--plan", *sys.argv[1:]]) == 0
heavy = {"torch", "nemo", "megatron", "lightning", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    arguments = [f"run.path={tmp_path}/run", f"model.path={model}", f"data.path={data}", "train.seq_length=64"]
    arguments += ["train.global_batch_size=2", "train.validation_part=0", f"watch.store={tmp_path}/a"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)


def test_a_sliding_window_shorter_than_the_sequences_is_refused(tmp_path: Path) -> None:
    """Training has no attention that slides."""
    model = save_tiny(
        tmp_path / "model",
        Tiny(layers=2, groups=2, tied=True),
        vocab_size=384,
        use_sliding_window=True,
        sliding_window=32,
        max_window_layers=1,
    )
    settings = FinetuneSettings(
        model=ModelSettings(path=str(model)),
        data=DataSettings(path=str(write_documents(tmp_path / "data.jsonl", (300,)))),
        train=TrainSettings(seq_length=64),
        run=RunSettings(path=str(tmp_path / "run")),
        parallel=ParallelSettings(),
    )
    with pytest.raises(ConfigError, match=r"`train\.seq_length` must be at most the model's sliding window \(32\)"):
        prepare(settings, world=None)
