"""Which steps and samples are captured."""

from typing import Any

import pytest

from nemo_qwen_hidden.errors import ConfigErrors, UserError
from nemo_qwen_hidden.training.watch.schedule import Schedule


def captured(schedule: Schedule, phase: str = "train") -> list[int]:
    return [step for step in range(20) if schedule.captures(phase, step)]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Schedule(), list(range(20))),
        (Schedule(every=6), [0, 6, 12, 18]),
        (Schedule(every=6, first=1, last=12), [6, 12]),
        (Schedule(steps=(3, 5)), [3, 5]),
        (Schedule(steps=[3, 5], every=10), [0, 3, 5, 10]),
        (Schedule(steps=(3, 5, 7), first=4), [5, 7]),
        (Schedule(phases=("validation",)), []),
    ],
)
def test_steps(schedule: Schedule, steps: list[int]) -> None:
    assert captured(schedule) == steps


def test_phases() -> None:
    both = Schedule(every=10, phases=["train", "validation"])
    assert captured(both) == captured(both, "validation") == [0, 10]
    assert captured(Schedule(every=10), "validation") == []


def test_samples() -> None:
    assert [sample for sample in range(9) if Schedule(samples=[1, 7]).chooses(sample)] == [1, 7]
    assert [sample for sample in range(9) if Schedule(samples=range(2, 4)).chooses(sample)] == [2, 3]
    assert [sample for sample in range(9) if Schedule(samples=lambda n: n % 4 == 0).chooses(sample)] == [0, 4, 8]
    assert all(Schedule().chooses(sample) for sample in range(9))


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"every": 0}, "every"),
        ({"every": 1.5}, "every"),
        ({"every": True}, "every"),
        ({"steps": [-1]}, "steps"),
        ({"steps": "3"}, "steps"),
        ({"steps": 3}, "steps"),
        ({"first": -1}, "first"),
        ({"first": 5, "last": 4}, "last"),
        ({"phases": "train"}, "phases"),
        ({"phases": ("test",)}, "phases"),
        ({"phases": ()}, "phases"),
        ({"samples": []}, "samples"),
        ({"samples": [0.5]}, "samples"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], setting: str) -> None:
    with pytest.raises(UserError) as refused:
        Schedule(**settings)
    assert refused.value.setting == setting


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigErrors) as refused:
        Schedule(every=-1, phases=("test",), samples=[-1])
    assert [problem.setting for problem in refused.value.problems] == ["every", "phases", "samples"]
