"""``HiddenStatesCallback``: hidden states of a NeMo training run, of the steps, phases and samples that are chosen."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from nemo_qwen_hidden.capture.rows import Choice
from nemo_qwen_hidden.capture.staging import staged
from nemo_qwen_hidden.capture.taps import Capture
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import expand
from nemo_qwen_hidden.model.config import TORCH_DTYPES
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.training.batches import Lengths, Noted, Numbering
from nemo_qwen_hidden.training.chunks import live_chunks, live_groups, live_stages
from nemo_qwen_hidden.training.observer import Observer
from nemo_qwen_hidden.training.recorder import ROW_STRIDE, StepStates
from nemo_qwen_hidden.training.schedule import TRAIN, VALIDATION, Samples, Schedule
from nemo_qwen_hidden.training.step import CapturedStep

StepSink = Callable[[StepStates], None]
"""Called on every rank for each captured step, with what this rank has of it."""


@dataclass(kw_only=True)
class _Fit:
    """While a fit lasts. consumed: samples before the step that goes on, by phase, those of a validation from its own
    beginning. noted, entered: while a step of NeMo's is captured, its batches, and what has to be left after it.
    gathered: the captured step that goes on."""

    observer: Observer
    groups: ProcessGroups
    sampler: MegatronDataSampler
    consumed: dict[str, int] = field(default_factory=dict)
    noted: Noted | None = None
    entered: ExitStack = field(default_factory=ExitStack)
    gathered: CapturedStep | None = None

    def numbering(self, step: MegatronStep, phase: str) -> Numbering:
        return Numbering(
            consumed=self.consumed[phase],
            micro_batch_size=step.micro_batch_size,
            microbatches=step.num_microbatches,
            replicas=self.groups.topology.dp,
            strided=self.sampler.dataloader_type == "batch",
        )


class HiddenStatesCallback(Callback, IOMixin):
    """Captures hidden states of a run of NeMo's ``Trainer`` with ``MegatronStrategy``, each exactly once.

    Args:
        hook_points: such as ``["resid_post@0:24:6", "final_norm"]``; all but ``attn_weights``.
        to: a folder, which becomes a store with a part for each captured step; or a function of ``StepStates``, called
            on every rank with what that rank answers for: of a training step before the optimizer changes the weights.
        every, steps, first, last, phases, samples: which steps, and which samples of them, see ``Schedule``.
        dtype: of what is stored or handed on, one of fp32, bf16 and fp16; None: the dtype that the states have.
        lengths: from a batch to the number of tokens of each of its samples; None: as the batch says, see
            ``training.batches.lengths_of``.

    Raises:
        ConfigError, ConfigErrors: settings that cannot be; when the fit starts, a trainer or a model that cannot be
            captured, and in a captured step, batches that do not say what has to be known.
    """

    def __init__(
        self,
        *,
        hook_points: str | Sequence[str],
        to: str | Path | StepSink,
        every: int | None = None,
        steps: Sequence[int] = (),
        first: int = 0,
        last: int | None = None,
        phases: Sequence[str] = (TRAIN,),
        samples: Samples | None = None,
        dtype: str | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in TORCH_DTYPES:
            raise ConfigError("dtype", f"must be one of {', '.join(TORCH_DTYPES)}, or None", dtype)
        self._schedule = Schedule(every=every, steps=steps, first=first, last=last, phases=phases, samples=samples)
        self._hook_points, self._to, self._lengths = hook_points, to, lengths
        self._dtype = None if dtype is None else TORCH_DTYPES[dtype]
        self._fit: _Fit | None = None

    # Lightning's events

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the model. Collective over all ranks."""
        if trainer.accumulate_grad_batches != 1:
            rule = "must be 1: NeMo accumulates gradients over the microbatches of a step"
            raise ConfigError("accumulate_grad_batches", rule, trainer.accumulate_grad_batches)
        sampler = getattr(trainer.strategy, "data_sampler", None)
        if not isinstance(sampler, MegatronDataSampler):
            raise ConfigError("the data module", "must have a MegatronDataSampler as `data_sampler`", sampler)
        chunks, groups = live_chunks(trainer), live_groups(trainer)
        points = expand(self._hook_points, num_layers=chunks[0].config.num_layers, setting="hook_points")
        capture = Capture(points=points, choice=self._choice())
        observer = Observer(chunks, groups, stages=live_stages(trainer), capture=capture)
        self._fit = _Fit(observer=observer, groups=groups, sampler=sampler)

    def _choice(self) -> Choice | None:
        chooses = self._schedule.chooses
        if self._schedule.samples is None:
            return None
        return Choice(kept=lambda first_row, _length: None if chooses(first_row // ROW_STRIDE) else ())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has got its step and the number of samples before it by now."""
        fit = self._running()
        fit.consumed[TRAIN] = fit.sampler.init_consumed_samples

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every validation begins with the first sample of its data."""
        if self._fit is not None and (phase := _phase(trainer)) is not None:
            self._fit.consumed[phase] = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands on what was captured of the validation."""
        if self._fit is not None:
            self._hand_on()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the taps away."""
        if self._fit is not None:
            self._fit.entered.__exit__(type(exception), exception, exception.__traceback__)
            self._fit = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit = None

    # those of NeMo's MegatronParallel

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Of a step that is captured, notes what the data loader gives."""
        fit, phase, number = self._fit, _phase(step.trainer), step.trainer.global_step
        if fit is None or phase is None or not self._schedule.captures(phase, number):
            return step
        if not isinstance(step.data, Iterator):
            raise ConfigError("the data of a step", "must be an iterator over batches", type(step.data).__name__)
        if fit.gathered is None:
            fit.gathered = CapturedStep(
                phase,
                number,
                fit.groups.place,
                chooses=self._schedule.chooses,
                lengths=self._lengths,
                dtype=self._dtype,
            )
        fit.noted = Noted(step.data)
        return dataclasses.replace(step, data=fit.noted)

    def on_megatron_microbatches_start(self, step: MegatronStep) -> None:
        fit = self._fit
        if fit is None or fit.noted is None or fit.gathered is None:
            return
        numbering = fit.numbering(step, fit.gathered.phase)
        sink = fit.entered.enter_context(staged(fit.gathered.take, fit.groups.device))
        fed = fit.gathered.fed(fit.noted, numbering)
        fit.entered.enter_context(fit.observer.watching(fed, sink, microbatches=numbering.microbatches))

    def on_megatron_microbatches_end(self, step: MegatronStep) -> None:
        if self._fit is not None:
            self._fit.entered.close()
            self._fit.noted = None

    def on_megatron_step_end(self, step: MegatronStep) -> None:
        fit, phase = self._fit, _phase(step.trainer)
        if fit is None or phase is None:
            return
        fit.consumed[phase] += fit.numbering(step, phase).samples
        if phase == TRAIN:
            self._hand_on()

    def _hand_on(self) -> None:
        fit = self._running()
        if fit.gathered is not None:
            states, fit.gathered = fit.gathered.states(), None
            assert callable(self._to)
            self._to(states)

    def _running(self) -> _Fit:
        assert self._fit is not None
        return self._fit


def _phase(trainer: Trainer) -> str | None:
    """What the trainer does that can be captured; not the trial of a few validation batches before a run."""
    if trainer.training:
        return TRAIN
    return VALIDATION if trainer.validating else None
