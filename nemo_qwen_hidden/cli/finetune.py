"""``nemo-qwen-hidden finetune``: a run on ranks that it starts itself, or as one of those that torchrun started."""

import argparse
from contextlib import ExitStack

from nemo_qwen_hidden import finetuning
from nemo_qwen_hidden.cli.fault import fault_line, one_says, saying_at_once
from nemo_qwen_hidden.cli.finetune_plan import brief
from nemo_qwen_hidden.cli.terminal import Terminal, human
from nemo_qwen_hidden.errors import RankError, UserError
from nemo_qwen_hidden.finetuning import Outcome
from nemo_qwen_hidden.parallel import launch
from nemo_qwen_hidden.parallel.watch import Pulse
from nemo_qwen_hidden.progress import Phase, TrainingStep
from nemo_qwen_hidden.training.job import FinetuningJob
from nemo_qwen_hidden.training.outlook import Outlook


def run(parsed: argparse.Namespace, seen: Outlook) -> int:
    """Runs the job that ``seen`` is of to its end.

    Raises:
        UserError: it could not be done.
        RankError: a fault. PeerError: a rank of torchrun's failed and has said why.
        KeyboardInterrupt: all ranks have ended, and the text says what is left.
    """
    job = seen.job
    with Terminal(quiet=parsed.quiet or not launch.is_first_rank()) as terminal:
        teller = _Teller(terminal)
        for line in brief(seen):
            terminal.note(line)
        try:
            if launch.launched_world() is None:
                _start_ranks(job, teller)
            else:
                _be_a_rank(job, terminal, teller)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_left(job)) from None
        if launch.is_first_rank():
            _show(finetuning.outcome(job, teller.last), terminal)
    return 0


def _start_ranks(job: FinetuningJob, teller: "_Teller") -> None:
    from nemo_qwen_hidden.training.started import fit_started

    try:
        with launch.one_interrupt(), launch.output_to(job.log_path), finetuning.locked(job):
            teller(Phase("starting ranks"))
            launch.run_ranks(
                fit_started,
                (job,),
                world=job.topology.world,
                log=job.log_path,
                on_event=lambda rank, event: teller(event),
            )
    except UserError:
        raise
    except Exception as error:
        fault = RankError(fault_line(error, job.log_path))
        fault.add_note(_left(job))
        raise fault from error


def _be_a_rank(job: FinetuningJob, terminal: Terminal, teller: "_Teller") -> None:
    with launch.output_to(job.log_path), ExitStack() as lock:
        if launch.is_first_rank():  # for all: where ranks meet, the others wait for it
            with saying_at_once(terminal, job.log_path):
                lock.enter_context(finetuning.locked(job))
        with saying_at_once(terminal, job.log_path, lambda: _left(job)):
            _fit(job, terminal, teller)


def _fit(job: FinetuningJob, terminal: Terminal, teller: "_Teller") -> None:
    """As a rank of torchrun's. Collective over all ranks, which watch each other."""
    from nemo_qwen_hidden.parallel.peers import meet, watched
    from nemo_qwen_hidden.training.run import fit

    def say(fault: str) -> None:
        terminal.error(f"{fault} (more in {job.log_path})")
        terminal.error(_left(job))

    pulse, meeting = Pulse(), meet()
    said = saying_at_once(terminal, job.log_path, lambda: _left(job))
    with watched(pulse, say, meeting=meeting), said, one_says(meeting):
        try:
            fit(job, report=teller, pulse=pulse, rendezvous=meeting.store)
        except SystemExit as end:  # Lightning's answer to an interrupt (trainer/call.py of 2.4)
            if isinstance(end.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from end
            raise


def _left(job: FinetuningJob) -> str:
    if not job.begun:
        return f"no checkpoint is left at {job.run_path}"
    return f"the run at {job.run_path} can go on from its last checkpoint"


class _Teller:
    """Takes a run's events; a line for each."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self.last: TrainingStep | None = None

    def __call__(self, event: object) -> None:
        if isinstance(event, Phase):
            self._terminal.note(event.text)
        elif isinstance(event, TrainingStep):
            self.last = event
            self._terminal.note(_line(event))


def _line(step: TrainingStep) -> str:
    if step.validation_loss is not None:
        return f"step {step.step}/{step.steps}  validation loss {step.validation_loss:.4f}"
    speed = f"{human(step.tokens_per_second)} tokens/s"
    return f"step {step.step}/{step.steps}  loss {step.loss:.4f}  grad norm {step.grad_norm:.3f}  {speed}"


def _show(outcome: Outcome, terminal: Terminal) -> None:
    rows = [("checkpoint", str(outcome.checkpoint))]
    if outcome.last is None:
        rows.append(("work", "none: the run had come to its end"))
    else:
        rows.append(("loss", f"{outcome.last.loss:.4f} at step {outcome.last.step}"))
    terminal.table(rows, "fine-tuned")
