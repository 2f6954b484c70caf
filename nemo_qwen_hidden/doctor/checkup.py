"""A whole check-up: the algebra of an observation, its comparison with transformers, and what is wrong with it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nemo_qwen_hidden.checkpoint.architecture import Architecture
from nemo_qwen_hidden.checkpoint.fingerprint import final_norm_weight
from nemo_qwen_hidden.checkpoint.opened import open_weights
from nemo_qwen_hidden.doctor import algebra
from nemo_qwen_hidden.doctor.compare import Comparison, compare
from nemo_qwen_hidden.doctor.diagnose import DESCRIBED, Diagnosis
from nemo_qwen_hidden.doctor.noise import noise_of
from nemo_qwen_hidden.doctor.observation import Observation, Passage
from nemo_qwen_hidden.doctor.reference import Reference
from nemo_qwen_hidden.doctor.report import FAILED, OK, SKIPPED, UNEXPLAINED, Check, Finding, Report, number
from nemo_qwen_hidden.hookpoint import by_depth

TRANSFORMERS = "every hook point agrees with transformers"


def check_up(
    observation: Observation,
    folder: Path,
    architecture: Architecture,
    *,
    adapter: Path | None = None,
    subject: Sequence[tuple[str, str]],
    checks: Sequence[Check] = (),
    findings: Sequence[Finding] = (),
) -> Report:
    """Looks at ``observation``, of the model in ``folder``.

    checks, findings: those made already, while the states were taken.
    """
    count = architecture.shape.num_layers
    states = {point: observation.states[point] for point in by_depth(observation.states, count)}
    observation = replace(observation, states=states)
    weight = torch.from_numpy(final_norm_weight(open_weights(folder, architecture)).copy())
    norm = algebra.FinalNorm(weight=weight, epsilon=architecture.norm_epsilon)
    made = [*checks, *algebra.checks(observation, num_layers=count, norm=norm)]
    found, notes = list(findings), list[str]()
    try:
        reference = Reference(folder, adapter=adapter)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        made.append(Check(name=TRANSFORMERS, status=SKIPPED, detail=f"it cannot load the model: {reason}"))
    else:
        check, more, noted = _against(reference, partial(Reference, folder, adapter=adapter), observation)
        made.append(check)
        # what ranks have seen of each other says more than a description of what came of it
        found += [each for each in more if not found or each.fault not in (*DESCRIBED, *(f.fault for f in found))]
        notes += noted
    failed = [check for check in made if check.status == FAILED]
    if failed and not found:
        first = failed[0]
        evidence = (f"first at {first.place}",) if first.place else ()
        found.append(Finding(fault=UNEXPLAINED, says=f"{first.name}: does not hold; {first.detail}", evidence=evidence))
    return Report(subject=tuple(subject), checks=tuple(made), findings=tuple(found), notes=tuple(notes))


def _against(
    reference: Reference, load: Callable[..., Reference], observation: Observation
) -> tuple[Check, list[Finding], list[str]]:
    truth = reference.run(observation, observation.states)
    coarse = None if observation.compute == "fp32" else load(dtype=observation.compute)
    noise = noise_of(reference, observation, truth, coarse)
    comparison = compare(observation, truth, noise)
    if not comparison.errors:
        return Check(name=TRANSFORMERS, status=SKIPPED, detail="no hook point that it has"), [], []
    diagnosis = Diagnosis(reference, observation, truth, noise, lambda dtype: load(dtype=dtype))
    findings = diagnosis.findings()
    if comparison.wrong:
        detail = f"{len(comparison.wrong)} of {len(comparison.errors)} differ"
        place = comparison.first(observation)
        return Check(name=TRANSFORMERS, status=FAILED, detail=detail, place=place), findings, []
    notes = []
    if observation.compute != "fp32" or observation.stored != "fp32":
        dtypes = observation.compute if observation.stored == observation.compute else observation.stored
        notes.append(f"the error is what {dtypes} makes of this model: {_error(comparison)}")
    return Check(name=TRANSFORMERS, status=OK, detail=_error(comparison)), findings, notes


def _error(comparison: Comparison) -> str:
    point = max(comparison.errors, key=comparison.excess)
    worst, allowed = float(comparison.errors[point].max()), float(comparison.tolerances[point].max())
    return (
        f"{len(comparison.errors)} hook points, at most {number(worst)} of a row ({point}; {number(allowed)} allowed)"
    )


def chosen(lengths: Sequence[int], count: int) -> list[int]:
    """At most ``count`` documents with tokens, of lengths as different as there are, in order."""
    with_tokens = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: lengths[index])
    if len(with_tokens) <= count:
        return sorted(with_tokens)
    if count == 1:
        return [with_tokens[len(with_tokens) // 2]]
    places = [round(step * (len(with_tokens) - 1) / (count - 1)) for step in range(count)]
    return sorted(with_tokens[place] for place in places)


def passage_of(document: int, token_ids: Sequence[int], most_tokens: int) -> Passage:
    """The beginning of a document; what follows it has no influence on it, attention being causal."""
    return Passage(document=document, token_ids=torch.tensor(token_ids[:most_tokens], dtype=torch.int64))
