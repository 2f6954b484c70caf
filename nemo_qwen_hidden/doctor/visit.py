"""The doctor at a live model: chooses documents, runs them on the ranks of a layout, and writes the report."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from nemo_qwen_hidden.config import CaptureSettings, Settings, TokenSettings
from nemo_qwen_hidden.data.sources import read_documents
from nemo_qwen_hidden.data.tokenize import require_tokens, tokenize
from nemo_qwen_hidden.data.tokenizer import load_tokenizer
from nemo_qwen_hidden.doctor.checkup import check_up, chosen, passage_of
from nemo_qwen_hidden.doctor.observation import Passage
from nemo_qwen_hidden.doctor.report import Report, counted
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, EMBED, FINAL_NORM, LAYER_SITES
from nemo_qwen_hidden.job import Job

if TYPE_CHECKING:
    from nemo_qwen_hidden.doctor.live import Examined
    from nemo_qwen_hidden.parallel.groups import ProcessGroups

LOOKED_AT = 256
SITES = tuple(site for site in LAYER_SITES if site != ATTN_WEIGHTS)


def everywhere(settings: Settings) -> Settings:
    """``settings`` with every site of every layer as its hook points, but attention weights, and all tokens."""
    points = (EMBED, *(f"{site}@0:" for site in SITES), FINAL_NORM)
    return replace(settings, capture=CaptureSettings(hook_points=points), tokens=TokenSettings())


def choose(job: Job, *, documents: int, tokens: int) -> tuple[Passage, ...]:
    """The beginnings of some documents of the job's data, of lengths as different as the first ``LOOKED_AT`` have.

    Raises:
        DataError: data that cannot be used.
    """
    data = job.settings.data
    stream = read_documents(job.data_path, text_field=data.text_field, id_field=data.id_field)
    vocab_size = job.architecture.shape.vocab_size
    tokenized = tokenize(stream, lambda: load_tokenizer(job.tokenizer_folder), vocab_size=vocab_size)
    ids = [document.token_ids for document in islice(tokenized, LOOKED_AT)]
    most = min(tokens, job.batching.max_tokens)
    passages = tuple(
        passage_of(index, ids[index].tolist(), most) for index in chosen([len(each) for each in ids], documents)
    )
    require_tokens(sum(len(passage) for passage in passages), job.data_path)
    return passages


def examine(
    job: Job, passages: Sequence[Passage], groups: "ProcessGroups", progressed: Callable[[], None]
) -> "Examined":
    """Builds the model and runs ``passages`` on it. Collective over all ranks."""
    from nemo_qwen_hidden.doctor import live
    from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel

    compute = job.settings.precision.compute
    model = Qwen2HiddenModel.from_pretrained(
        job.model_folder, groups=groups, dtype=compute, final_norm=True, split=job.split, adapter=job.adapter_folder
    )
    return live.examine(
        model,
        passages,
        job.points,
        compute=compute,
        batch_tokens=job.settings.data.batch_tokens,
        packing=job.settings.data.packing,
        progressed=progressed,
    )


def report(job: Job, passages: Sequence[Passage], examined: "Examined") -> Report:
    """What was found. On rank 0."""
    assert examined.observation is not None, "only rank 0 has what the ranks have found"
    subject = [
        ("model", str(job.model_folder)),
        ("layout", str(job.topology)),
        ("dtype", job.settings.precision.compute),
        ("documents", described(passages)),
    ]
    return check_up(
        examined.observation,
        job.model_folder,
        job.architecture,
        adapter=job.adapter_folder,
        subject=subject,
        checks=examined.checks,
        findings=examined.findings,
    )


def described(passages: Sequence[Passage]) -> str:
    """How many tokens of which documents."""
    lengths = [len(passage) for passage in passages]
    each = f"{min(lengths)} to {max(lengths)} of each" if len(lengths) > 1 else "its first"
    return f"{counted(sum(lengths), 'token')} of {counted(len(lengths), 'document')}, {each}"
