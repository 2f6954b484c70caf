"""``ProbeSetCallback``: the same documents through the model of a NeMo training run, at steps of its choice."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.capture.pipeline import Pipeline
from nemo_qwen_hidden.capture.staging import staged
from nemo_qwen_hidden.capture.taps import Capture, LocalSlice
from nemo_qwen_hidden.config import NONFINITE, TokenSettings
from nemo_qwen_hidden.data.sources import check_path
from nemo_qwen_hidden.data.tokenizer import Tokenizer, load_tokenizer
from nemo_qwen_hidden.drift.labels import Labels, from_field, repeated_tokens
from nemo_qwen_hidden.drift.measures import measure
from nemo_qwen_hidden.drift.probe_accuracy import can_be_told
from nemo_qwen_hidden.drift.probe_set import PHASE, ProbeSet
from nemo_qwen_hidden.errors import ConfigError, naming, status_of
from nemo_qwen_hidden.hookpoint import ATTN_WEIGHTS, HookPoint, expand
from nemo_qwen_hidden.model.config import TORCH_DTYPES
from nemo_qwen_hidden.parallel.agree import on_rank_0
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.plan.microbatches import Batching
from nemo_qwen_hidden.store.format import DTYPES
from nemo_qwen_hidden.store.read.reader import Store, open_store
from nemo_qwen_hidden.training.chunks import live_chunks, live_groups, live_stages
from nemo_qwen_hidden.training.watch.description import adapter_of, decoder_shape, describe
from nemo_qwen_hidden.training.watch.kept import KeptArguments
from nemo_qwen_hidden.training.watch.probe_documents import ProbeDocuments, check_tokens, read_samples
from nemo_qwen_hidden.training.watch.probe_labels import REPEATED, check_labels
from nemo_qwen_hidden.training.watch.recorder import Recorder
from nemo_qwen_hidden.training.watch.schedule import TRAIN, Schedule
from nemo_qwen_hidden.training.watch.step_states import Sample, StepStates

BATCH_TOKENS = 4096


@dataclass(kw_only=True)
class _Fit:
    """While a fit lasts. reference: the first step of the store, which drift is measured against."""

    groups: ProcessGroups
    stages: Sequence[range]
    points: tuple[HookPoint, ...]
    documents: ProbeDocuments
    recorder: Recorder
    reference: int | None = None


class ProbeSetCallback(Callback, KeptArguments):
    """Runs the same documents through the model as it is before the first step and after every ``every`` steps, in
    evaluation mode and without gradients, and keeps their states, so that they can be compared from step to step.

    Training goes on as if nothing had happened: weights, gradients, losses and random numbers stay as they are.

    Args:
        hook_points: as of an extraction; all but ``attn_weights``.
        to: the folder of the store, which gets a part for each step. A resumed run goes on with it.
        documents: what ``data.path`` takes; None is the text that comes with this package. Rank 0 alone reads them.
        every, steps, first, last: which steps, see ``Schedule``; step n is after n steps of the optimizer.
        tokens: which tokens' states are kept, see ``docs/tokens.md``; None is all.
        tokenizer: a Hugging Face folder; None: the trained model's own.
        max_documents: the first so many; None: all. max_tokens: the longest window that is run at once; None: the
            length that the model is trained with. batch_tokens, packing: as of an extraction.
        text_field, messages_field, id_field: where records hold what.
        dtype: that states are stored in, one of fp32, bf16, fp16 and int8; None: that of the model.
        nonfinite: ``refuse`` or ``keep`` infinite values and NaN.
        log: whether the drift to the store's first step goes to the trainer's logger, see ``docs/drift.md``.
        labels: what a linear probe is trained to tell, for the log: a field of the records, ``repeated`` (whether a
            token has stood in its document before, where that can be learnt of these documents), or None for no probe.

    Raises:
        ConfigError: settings that cannot be; when training starts, what the model cannot give.
        DataError: documents that cannot be used. StoreError: another store is there.
    """

    def __init__(
        self,
        *,
        hook_points: str | Sequence[str],
        to: str | Path,
        documents: str | Path | None = None,
        every: int | None = None,
        steps: Sequence[int] = (),
        first: int = 0,
        last: int | None = None,
        tokens: TokenSettings | None = None,
        tokenizer: str | Path | None = None,
        max_documents: int | None = None,
        max_tokens: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        packing: bool = True,
        text_field: str = "text",
        messages_field: str = "messages",
        id_field: str = "id",
        dtype: str | None = None,
        nonfinite: str = "refuse",
        log: bool = True,
        labels: str | None = REPEATED,
    ) -> None:
        super().__init__()
        for name, size in (
            ("max_documents", max_documents),
            ("max_tokens", max_tokens),
            ("batch_tokens", batch_tokens),
        ):
            if size is not None and not (isinstance(size, int) and size >= 1):
                raise ConfigError(name, "must be a whole number of at least 1", size)
        for name, path in (("to", to), ("documents", documents), ("tokenizer", tokenizer)):
            if not (isinstance(path, str | Path) and str(path)) and (name == "to" or path is not None):
                raise ConfigError(name, "must be a path", path)
        if not (tokens is None or isinstance(tokens, TokenSettings)):
            raise ConfigError("tokens", "must be `config.TokenSettings`, or None", tokens)
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError("dtype", f"must be one of {', '.join(DTYPES)}, or None", dtype)
        if nonfinite not in NONFINITE:
            raise ConfigError("nonfinite", f"must be one of {', '.join(NONFINITE)}", nonfinite)
        self._tokens = tokens or TokenSettings()
        check_tokens(self._tokens)
        self._schedule = Schedule(every=every, steps=steps, first=first, last=last)
        self._hook_points, self._to, self._tokenizer = hook_points, Path(to), tokenizer
        self._documents = str(demo.text_path()) if documents is None else os.path.expanduser(documents)
        self._max_documents, self._max_tokens = max_documents, max_tokens
        self._batch_tokens, self._packing = batch_tokens, packing
        fields = {"text_field": text_field, "messages_field": messages_field, "id_field": id_field}
        self._fields: dict[str, Any] = {**fields, "mask_field": self._tokens.mask_field}
        self._dtype, self._nonfinite, self._log, self._labels = dtype, nonfinite, log, labels
        self._fit: _Fit | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Before the first, reads the documents, opens the store, and captures the step that the run begins with: by
        now NeMo has put in an adapter, if there is one, and the weights that it goes on with. Collective over all
        ranks."""
        if self._fit is None:
            self._fit = self._begin(trainer, pl_module)
            self._capture(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Captures the step that was reached. Collective over all ranks."""
        self._capture(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What a resumed run will not do again is durable before its checkpoint is there. Collective over all ranks."""
        if self._fit is not None:
            self._fit.recorder.flush()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the store. Collective over all ranks."""
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.recorder.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the store to the run that resumes."""
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.recorder.abandon()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> _Fit:
        chunks, groups = live_chunks(trainer), live_groups(trainer)
        config: Any = chunks[0].config
        if getattr(getattr(trainer.strategy, "ddp_config", None), "overlap_param_gather", False):
            rule = "must be false beside a probe set, which is run between steps, before weights are gathered"
            raise ConfigError("overlap_param_gather", rule, True)
        points = expand(self._hook_points, num_layers=config.num_layers, setting="hook_points")
        if any(point.site == ATTN_WEIGHTS for point in points):
            raise ConfigError("hook_points", "must leave out attn_weights for a probe set", self._hook_points)
        batching = Batching(
            max_tokens=self._max_tokens or config.seq_length,
            batch_tokens=self._batch_tokens,
            packing=self._packing,
            multiple_of=groups.topology.sequence_multiple,
            segment_multiple=groups.topology.segment_multiple,
        )
        vocab_size = decoder_shape(config).vocab_size
        samples = on_rank_0(lambda: self._read(pl_module, vocab_size), groups, status_of=status_of)
        compute = next(name for name, dtype in TORCH_DTYPES.items() if dtype == config.params_dtype)
        dtypes: dict[str, Any] = {"compute": compute, "stored": self._dtype or compute}
        what = describe(config, points, groups, work="probe set", adapter=adapter_of(trainer), **dtypes)
        step = trainer.global_step
        recorder = Recorder(self._to, what, groups, resume_at=step or None, begins=not step, nonfinite=self._nonfinite)
        return _Fit(
            groups=groups,
            stages=live_stages(trainer),
            points=points,
            documents=ProbeDocuments(samples=samples, batching=batching),
            recorder=recorder,
        )

    def _read(self, pl_module: LightningModule, vocab_size: int) -> tuple[Sample, ...]:
        with naming({"data.path": "documents"}):
            check_path(self._documents, **self._fields)
            samples = read_samples(
                self._documents,
                lambda: self._load_tokenizer(pl_module),
                self._tokens,
                vocab_size=vocab_size,
                most=self._max_documents,
                fields=self._fields,
            )
        if self._log:
            documents = [(str(sample.id), len(sample.token_ids)) for sample in samples]
            check_labels(documents, self._labels, self._documents, id_field=self._fields["id_field"])
        return samples

    def _load_tokenizer(self, pl_module: LightningModule) -> Tokenizer:
        """NeMo's ``AutoTokenizer`` knows the folder that it was made from."""
        folder = self._tokenizer
        if folder is None:
            known: Any = getattr(pl_module, "tokenizer", None)
            folder = getattr(getattr(known, "tokenizer", None), "name_or_path", None)
        if not folder or not Path(folder).is_dir():
            rule = "must name a Hugging Face folder, since the documents are text and the trained model has none"
            raise ConfigError("tokenizer", rule, folder and str(folder))
        return load_tokenizer(Path(folder))

    def _capture(self, trainer: Trainer) -> None:
        """Collective over all ranks, where the step is captured."""
        fit, step = self._fit, trainer.global_step
        if fit is None or not self._schedule.captures(TRAIN, step):
            return
        slices: list[LocalSlice] = []
        documents, place = fit.documents, fit.groups.place
        capture = Capture(points=fit.points, choice=documents.choice())
        pipeline = Pipeline(live_chunks(trainer), fit.groups, stages=fit.stages, capture=capture)
        with staged(lambda piece: slices.append(documents.numbered(piece)), fit.groups.device) as sink:
            pipeline.run(documents.microbatches(place), documents.tokens, sink, lambda _: None)
        fit.recorder.put(
            StepStates(
                phase=PHASE,
                step=step,
                samples=documents.samples if place.rank == 0 else (),
                slices=tuple(slices),
            )
        )
        if self._log and trainer.loggers:
            fit.recorder.flush()
            values = on_rank_0(lambda: self._measure(fit, step), fit.groups, status_of=status_of)
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

    def _measure(self, fit: _Fit, step: int) -> dict[str, float]:
        store = open_store(self._to)
        if fit.reference is None:
            fit.reference = store.steps[0].step
        return measure(store, step=step, reference=fit.reference, labels=self._labels_of(store, fit.reference))

    def _labels_of(self, store: Store, reference: int) -> Labels | None:
        if self._labels is None:
            return None
        if self._labels == REPEATED:
            labels = repeated_tokens(ProbeSet(store), reference)
            return labels if can_be_told(labels) else None
        return from_field(ProbeSet(store), reference, self._labels, self._documents, id_field=self._fields["id_field"])
