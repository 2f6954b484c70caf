"""``HiddenStatesCallback``: hidden states of a NeMo training run, of the steps, phases and samples that are chosen."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from nemo_qwen_hidden.capture.rows import Choice
from nemo_qwen_hidden.capture.staging import staged
from nemo_qwen_hidden.capture.taps import Capture
from nemo_qwen_hidden.config import NONFINITE
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import HookPoint, expand
from nemo_qwen_hidden.model.config import TORCH_DTYPES
from nemo_qwen_hidden.parallel.groups import ProcessGroups
from nemo_qwen_hidden.training.chunks import live_chunks, live_groups, live_stages
from nemo_qwen_hidden.training.watch.batches import Lengths, Noted, Numbering
from nemo_qwen_hidden.training.watch.description import adapter_of, describe
from nemo_qwen_hidden.training.watch.gathering import StepInProgress
from nemo_qwen_hidden.training.watch.kept import KeptArguments
from nemo_qwen_hidden.training.watch.observer import Observer
from nemo_qwen_hidden.training.watch.recorder import Recorder
from nemo_qwen_hidden.training.watch.schedule import TRAIN, VALIDATION, Samples, Schedule
from nemo_qwen_hidden.training.watch.step_states import ROW_STRIDE, StepStates

StepSink = Callable[[StepStates], None]
"""Called on every rank for each captured step, with what this rank has of it."""


STORED = (*TORCH_DTYPES, "int8")


@dataclass(kw_only=True)
class _Fit:
    """While a fit, or a validation alone, lasts. sink: of captured steps. recorder: behind it, where there is one.
    consumed: samples before the step that goes on, by phase, those of a validation from its own beginning. noted,
    entered: while a step of NeMo's is captured, its batches, and what has to be left after it. gathered: the captured
    step that goes on."""

    observer: Observer
    groups: ProcessGroups
    sampler: MegatronDataSampler
    sink: StepSink
    recorder: Recorder | None
    consumed: dict[str, int]
    noted: Noted | None = None
    entered: ExitStack = field(default_factory=ExitStack)
    gathered: StepInProgress | None = None

    def numbering(self, step: MegatronStep, phase: str) -> Numbering:
        return Numbering(
            consumed=self.consumed[phase],
            micro_batch_size=step.micro_batch_size,
            microbatches=step.num_microbatches,
            replicas=self.groups.topology.dp,
            strided=self.sampler.dataloader_type == "batch",
        )


class HiddenStatesCallback(Callback, KeptArguments):
    """Captures hidden states of a run of NeMo's ``Trainer`` with ``MegatronStrategy``, each exactly once.

    Args:
        hook_points: such as ``["resid_post@0:24:6", "final_norm"]``; all but ``attn_weights``.
        to: a folder, which becomes a store with a part for each captured step; or a function of ``StepStates``, called
            on every rank with what that rank answers for: of a training step before the optimizer changes the weights.
        every, steps, first, last, phases, samples: which steps, and which samples of them, see ``Schedule``.
        dtype: of what is stored or handed on, one of fp32, bf16, fp16, and in a store int8; None: the model's.
        nonfinite: what a store does with infinite values and NaN, ``refuse``, which ends the run, or ``keep``.
        lengths: from a batch to the number of tokens of each of its samples; None: as the batch says, see
            ``training.watch.batches.lengths_of``.

    Raises:
        ConfigError, ConfigErrors: settings that cannot be; when the fit starts, a trainer or a model that cannot be
            captured, and in a captured step, batches that do not say what has to be known.
        StoreError: the folder is no store of this run, or cannot be written.
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
        nonfinite: str = "refuse",
        lengths: Lengths | None = None,
    ) -> None:
        super().__init__()
        known = TORCH_DTYPES if callable(to) else STORED
        if dtype is not None and dtype not in known:
            raise ConfigError("dtype", f"must be one of {', '.join(known)}, or None", dtype)
        if nonfinite not in NONFINITE:
            raise ConfigError("nonfinite", f"must be one of {', '.join(NONFINITE)}", nonfinite)
        if not callable(to) and not (isinstance(to, str | Path) and str(to)):
            raise ConfigError("to", "must be a folder, or a function", to)
        if not (lengths is None or callable(lengths)):
            raise ConfigError("lengths", "must be a function of a batch, or None", lengths)
        self._schedule = Schedule(every=every, steps=steps, first=first, last=last, phases=phases, samples=samples)
        self._hook_points, self._to, self._lengths = hook_points, to, lengths
        self._dtype, self._nonfinite = dtype, nonfinite
        self._fit: _Fit | None = None

    # Lightning's events

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the model, and opens the store; a resumed run has its step by now. Collective over all ranks."""
        if trainer.accumulate_grad_batches != 1:
            rule = "must be 1: NeMo accumulates gradients over the microbatches of a step"
            raise ConfigError("accumulate_grad_batches", rule, trainer.accumulate_grad_batches)
        self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every validation begins with the first sample of its data. Outside of a fit collective over all ranks."""
        if _phase(trainer) is not None:
            self._running(trainer).consumed[VALIDATION] = 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands on what was captured of the validation; before a checkpoint that comes after it."""
        if _phase(trainer) is not None:
            self._hand_on()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the store of a validation alone. Collective over all ranks, then."""
        if _phase(trainer) is not None and trainer.state.fn == TrainerFn.VALIDATING:
            self._end()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What a resumed run will not do again is durable before its checkpoint is there. Collective over all ranks."""
        if self._fit is not None and self._fit.recorder is not None:
            self._fit.recorder.flush()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the store. Collective over all ranks."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the taps away, and leaves the store to the run that resumes."""
        fit, self._fit = self._fit, None
        if fit is not None:
            if fit.recorder is not None:
                fit.recorder.abandon()
            fit.entered.__exit__(type(exception), exception, exception.__traceback__)

    # those of NeMo's MegatronParallel

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Of a step that is captured, notes what the data loader gives."""
        phase, number = _phase(step.trainer), step.trainer.global_step
        if phase is None or not self._schedule.captures(phase, number):
            return step
        if not isinstance(step.data, Iterator):
            raise ConfigError("the data of a step", "must be an iterator over batches", type(step.data).__name__)
        fit = self._running(step.trainer)
        if phase == VALIDATION and fit.recorder is not None and fit.recorder.found(phase, number):
            return step  # Lightning's own loop does it again where the checkpoint came before it; NeMo's does not
        if fit.gathered is None:
            fit.gathered = StepInProgress(
                phase,
                number,
                fit.groups.place,
                chooses=self._schedule.chooses,
                lengths=self._lengths,
                dtype=TORCH_DTYPES.get(self._dtype or ""),
            )
        fit.noted = Noted(step.data)
        return dataclasses.replace(step, data=fit.noted)

    def on_megatron_microbatches_start(self, step: MegatronStep) -> None:
        """Puts the taps on. NeMo's data sampler has said by now how many microbatches there are."""
        fit = self._fit
        if fit is None or fit.noted is None or fit.gathered is None:
            return
        numbering = fit.numbering(step, fit.gathered.phase)
        sink = fit.entered.enter_context(staged(fit.gathered.take, fit.groups.device))
        fed = fit.gathered.fed(fit.noted, numbering)
        fit.entered.enter_context(fit.observer.watching(fed, sink, microbatches=numbering.microbatches))

    def on_megatron_microbatches_end(self, step: MegatronStep) -> None:
        """Takes them away."""
        if self._fit is not None:
            self._fit.entered.close()
            self._fit.noted = None

    def on_megatron_step_end(self, step: MegatronStep) -> None:
        """Hands a step of training on, and counts the samples of every step."""
        phase = _phase(step.trainer)
        if phase is None:
            return
        fit = self._running(step.trainer)
        fit.consumed[phase] += fit.numbering(step, phase).samples
        if phase == TRAIN:
            self._hand_on()

    def _running(self, trainer: Trainer) -> _Fit:
        return self._fit if self._fit is not None else self._begin(trainer)

    def _begin(self, trainer: Trainer) -> _Fit:
        """Collective over all ranks."""
        sampler = getattr(trainer.strategy, "data_sampler", None)
        if not isinstance(sampler, MegatronDataSampler):
            raise ConfigError("the data module", "must have a MegatronDataSampler as its `data_sampler`", sampler)
        chunks, groups = live_chunks(trainer), live_groups(trainer)
        points = expand(self._hook_points, num_layers=chunks[0].config.num_layers, setting="hook_points")
        capture = Capture(points=points, choice=_choice(self._schedule))
        observer = Observer(chunks, groups, stages=live_stages(trainer), capture=capture)
        recorder, to = None, self._to
        if not callable(to):
            recorder = self._recorder(Path(to), trainer, points, groups)
            to = recorder.put
        self._fit = _Fit(
            observer=observer,
            groups=groups,
            sampler=sampler,
            sink=to,
            recorder=recorder,
            consumed={TRAIN: sampler.init_consumed_samples, VALIDATION: 0},
        )
        return self._fit

    def _recorder(self, folder: Path, trainer: Trainer, points: Sequence[HookPoint], groups: ProcessGroups) -> Recorder:
        """A run that begins drops nothing of a store that is there, which is then refused. One that is resumed keeps
        the validation before its first step, which was of the same weights."""
        config = live_chunks(trainer)[0].config
        compute = next(name for name, dtype in TORCH_DTYPES.items() if dtype == config.params_dtype)
        dtypes: dict[str, Any] = {"compute": compute, "stored": self._dtype or compute}
        fits = trainer.state.fn == TrainerFn.FITTING
        return Recorder(
            folder,
            describe(config, points, groups, work="training", adapter=adapter_of(trainer), **dtypes),
            groups,
            resume_at=trainer.global_step or None,
            staying=(VALIDATION,) if fits else (),
            begins=fits and not trainer.global_step,
            nonfinite=self._nonfinite,
        )

    def _hand_on(self) -> None:
        fit = self._fit
        if fit is not None and fit.gathered is not None:
            states, fit.gathered = fit.gathered.states(), None
            fit.sink(states)

    def _end(self) -> None:
        """Collective over all ranks."""
        fit, self._fit = self._fit, None
        if fit is not None and fit.recorder is not None:
            fit.recorder.close()


def _choice(schedule: Schedule) -> Choice | None:
    if schedule.samples is None:
        return None
    return Choice(kept=lambda first_row, _length: None if schedule.chooses(first_row // ROW_STRIDE) else ())


def _phase(trainer: Trainer) -> str | None:
    """What the trainer does that can be captured; not the trial of a few validation batches before a run."""
    if trainer.training:
        return TRAIN
    return VALIDATION if trainer.validating else None
