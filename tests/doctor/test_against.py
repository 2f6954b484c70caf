"""``doctor --against``: stores of this package, and states that plain scripts have stored in their own way."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nemo_qwen_hidden.checkpoint.fingerprint import weights_sha256
from nemo_qwen_hidden.checkpoint.tensors import TensorFiles
from nemo_qwen_hidden.cli.main import main
from nemo_qwen_hidden.hookpoint import HookPoint, by_depth
from nemo_qwen_hidden.store.entries import HookPointEntry
from nemo_qwen_hidden.store.upkeep.export import export
from nemo_qwen_hidden.store.write import place, session
from nemo_qwen_hidden.store.write.token_writer import TokenTableWriter
from tests.doctor import planted
from tests.doctor.planted import Case
from tests.store.helpers import draft, finish, write_states
from tests.support.models import Tiny, save_tiny

torch.set_num_threads(1)
LENGTHS = (9, 23, 1, 16)
LAYERS = 3
Against = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = save_tiny(tmp_path_factory.mktemp("against") / "model", Tiny(layers=LAYERS, groups=2, tied=True))
    generator = torch.Generator().manual_seed(21)
    return Case(folder, tuple(torch.randint(0, 383, (length,), generator=generator) for length in LENGTHS))


@pytest.fixture
def against(case: Case, capsys: pytest.CaptureFixture[str]) -> Against:
    def run(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
        status = main(["doctor", "--against", str(path), f"model.path={case.folder}", "--json", *arguments])
        return status, json.loads(capsys.readouterr().out)

    return run


def faults(report: dict[str, Any]) -> list[str]:
    return [finding["fault"] for finding in report["findings"]]


def status_of(report: dict[str, Any], name: str) -> str:
    return next(check["status"] for check in report["checks"] if name in check["name"])


def store(
    path: Path,
    case: Case,
    states: planted.States,
    *,
    stored: str = "fp32",
    folder: Path | None = None,
    kept: Callable[[int], Sequence[int]] | None = None,
    pooling: str | None = None,
) -> Path:
    """A store of these states of the case's documents, which names the weights in ``folder``. kept: of a document of
    some tokens, those whose states are stored."""
    points = by_depth(states, LAYERS)
    with place.locked(path):
        with session.staging(path) as staged:
            with TokenTableWriter(staged, shard_rows=20) as writer:
                for index, ids in enumerate(case.documents):
                    places = None if kept is None else np.array(kept(len(ids)), np.int64)
                    writer.append(document_id=str(index), source="test", token_ids=ids.int().numpy(), kept=places)
            part = writer.close()
            model = {"path": str(case.folder), "weights_sha256": weights_sha256(TensorFiles.of(folder or case.folder))}
            fields = {"hidden_size": 64, "stored_dtype": stored, "model": model, "pooling": pooling}
            shards = draft(part, **fields, hook_points=()).grid.shards
            entries = tuple(HookPointEntry.of(point, num_layers=LAYERS, shards=shards, shape=(64,)) for point in points)
            target = draft(part, **fields, hook_points=entries)
            session.start(path, target, {}, staged=staged)
        torch_dtype = {"bf16": torch.bfloat16}.get(stored, torch.float32)
        rows = [
            start + token
            for start, length in zip(np.cumsum((0, *LENGTHS)).tolist(), LENGTHS, strict=False)
            for token in (range(length) if kept is None else kept(length))
        ]
        kept_states = {point: states[point][rows].to(torch_dtype) for point in points}
        write_states(path, target, kept_states, [range(target.states)])
        finish(path, target)
    return path


def some(states: planted.States, *names: str) -> planted.States:
    return {HookPoint.parse(name): states[HookPoint.parse(name)] for name in names}


STORED = ("embed", "resid_post@0", "resid_post@1", "resid_post@2", "final_norm")


@pytest.mark.parametrize("stored", ["fp32", "bf16", "int8"])
def test_a_store_is_healthy_in_every_dtype(stored: str, tmp_path: Path, case: Case, against: Against) -> None:
    status, report = against(store(tmp_path / "store", case, some(case.run(), *STORED), stored=stored))
    assert (status, faults(report)) == (0, []), report
    assert status_of(report, "weights") == status_of(report, "transformers") == "ok"


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda case: planted.rope_base(case, 1e4), "rope-base"),
        (lambda case: planted.rows_of_each(case, lambda length: planted.zigzag(length, 2)), "tokens-permuted"),
        (lambda case: planted.zero_biases(case, "q", "k", "v"), "qkv-bias-missing"),
        (lambda case: planted.gate_and_up_swapped(case), "gate-up-swapped"),
        (lambda case: planted.padded_left(case, masked=True, misread=True), "padding-side"),
    ],
    ids=["rope", "zig-zag", "bias", "gate and up", "padding"],
)
def test_what_is_wrong_with_a_store_is_named_from_a_few_sites(
    plant: Callable[[Case], planted.States], fault: str, tmp_path: Path, case: Case, against: Against
) -> None:
    status, report = against(store(tmp_path / "store", case, some(plant(case), "resid_post@0", "resid_post@2")))
    assert (status, faults(report)) == (1, [fault]), report


def test_a_store_of_other_weights(tmp_path: Path, case: Case, against: Against) -> None:
    other = save_tiny(tmp_path / "other", Tiny(layers=LAYERS, groups=2, tied=True), rope_theta=1e4)
    weights = other / "model.safetensors"
    weights.write_bytes((case.folder / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\0")
    status, report = against(store(tmp_path / "store", case, some(case.run(), "embed"), folder=other))
    assert (status, faults(report)) == (1, ["other-weights"]), report
    assert status_of(report, "transformers") == "ok"


@pytest.mark.parametrize("kept", [lambda n: range(0, n, 3), lambda n: [n - 1]], ids=["every third", "last"])
@pytest.mark.parametrize(("base", "found"), [(1e6, []), (1e4, ["rope-base"])])
def test_a_store_that_keeps_some_rows(
    kept: Callable[[int], Sequence[int]], base: float, found: list[str], tmp_path: Path, case: Case, against: Against
) -> None:
    states = some(planted.rope_base(case, base), "embed", "resid_post@0", "resid_post@2")
    status, report = against(store(tmp_path / "store", case, states, kept=kept), "--tokens", "4")
    assert (status, faults(report)) == (len(found), found), report


def test_means_are_refused(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path / "store", case, some(case.run(), "embed"), kept=lambda n: [n - 1], pooling="mean")
    assert main(["doctor", "--against", str(path)]) == 2
    assert "must hold states of tokens, not means" in capsys.readouterr().err


def test_a_damaged_row_is_placed(tmp_path: Path, case: Case, against: Against) -> None:
    states = some(case.run(), "resid_post@0", "resid_post@1")
    states[HookPoint("resid_post", 1)][12] *= -1
    status, report = against(store(tmp_path / "store", case, states))
    assert (status, faults(report)) == (1, ["few-rows"]), report
    assert report["checks"][-1]["place"] == {"hook_point": "resid_post@1", "document": 1, "token": 3}


# Other programs


def dump(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name: values.contiguous() for name, values in tensors.items()}, path)
    return path


def batch_of(case: Case, *, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), longest, dtype=torch.int64), torch.zeros(len(LENGTHS), longest).long()
    for row, document in enumerate(case.documents):
        where = slice(0, len(document)) if side == "right" else slice(longest - len(document), longest)
        ids[row, where], mask[row, where] = document, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_of_transformers_in_a_padded_batch(
    side: str, tmp_path: Path, case: Case, against: Against
) -> None:
    ids, mask = batch_of(case, side=side)
    with torch.no_grad():
        states = case.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    file = dump(tmp_path / "dump.safetensors", token_ids=ids, attention_mask=mask, hidden_states=torch.stack(states))
    status, report = against(file)
    assert (status, faults(report)) == (0, []), report


def test_the_tuple_taken_for_layers_is_normed_at_its_end(tmp_path: Path, case: Case, against: Against) -> None:
    states = planted.hidden_states_tuple(case)
    named = {str(point): values for point, values in states.items()}
    lengths = torch.tensor(LENGTHS)
    file = dump(tmp_path / "dump.safetensors", token_ids=torch.cat(case.documents), lengths=lengths, **named)
    status, report = against(file)
    assert (status, faults(report)) == (1, ["after-final-norm"]), report


def test_a_batch_read_without_its_mask_shows_its_padding(tmp_path: Path, case: Case, against: Against) -> None:
    """A script that stores [batch, tokens] from the left, of a batch padded on the left."""
    ids, mask = batch_of(case, side="left")
    with torch.no_grad():
        states = case.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    rows = [torch.stack(states)[:, row, :length] for row, length in enumerate(LENGTHS)]
    tensors = {"token_ids": torch.cat(case.documents), "hidden_states": torch.cat(rows, dim=1)}
    status, report = against(dump(tmp_path / "dump.safetensors", lengths=torch.tensor(LENGTHS), **tensors))
    assert (status, faults(report)) == (1, ["padding-side"]), report


def test_an_exported_folder(tmp_path: Path, case: Case, against: Against) -> None:
    export(store(tmp_path / "store", case, some(case.run(), *STORED)), tmp_path / "arrays", to="npy")
    status, report = against(tmp_path / "arrays")
    assert (status, faults(report)) == (0, []), report
    broken = np.load(tmp_path / "arrays" / "resid_post@1.npy")
    np.save(tmp_path / "arrays" / "resid_post@1.npy", broken[::-1].copy())
    assert faults(against(tmp_path / "arrays")[1]) == ["tokens-permuted"]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"hidden_states": (4, 5, 64)}, "must hold `token_ids`"),
        ({"token_ids": (5,)}, "must hold `token_ids`, and states"),
        ({"token_ids": (5,), "hidden_states": (3, 5, 64)}, "must hold 4 states"),
        ({"token_ids": (5,), "resid_post@3": (5, 64)}, "must be of one of the model's 3 layers"),
        ({"token_ids": (5,), "embed": (4, 64)}, "must have a state for each of the 5 places"),
        ({"token_ids": (5,), "embed": (5, 64), "lengths": (2,)}, "must fit `token_ids` of shape [5]"),
    ],
)
def test_a_file_that_cannot_be_looked_at_is_refused(
    tensors: dict[str, Sequence[int]], says: str, tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        name: torch.zeros(*size, dtype=torch.float32 if len(size) > 1 else torch.int64)
        for name, size in tensors.items()
    }
    file = dump(tmp_path / "dump.safetensors", **made)
    assert main(["doctor", "--against", str(file), f"model.path={case.folder}"]) == 2
    assert says in capsys.readouterr().err


def test_there_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--against", str(tmp_path)]) == 2
    assert "`store` must be the folder of a store" in capsys.readouterr().err


def test_the_report_as_text_fits_80_columns(tmp_path: Path, case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path / "store", case, some(planted.rope_base(case, 1e4), *STORED))
    assert main(["doctor", "--against", str(path)]) == 1
    # paths of a test's folder have no place to be broken at
    lines = [line for line in capfd.readouterr().out.splitlines() if str(tmp_path.parent) not in line]
    assert any(line.startswith("rope-base: the rotary base is 10000") for line in lines), lines
    assert all(len(line) <= 80 for line in lines)
