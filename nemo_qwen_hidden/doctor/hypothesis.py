"""A hypothesis: what would have to be different for the states that were found to be the right ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_qwen_hidden.doctor.observation import Observation, States
from nemo_qwen_hidden.doctor.reference import Edit, Refeed, Reference
from nemo_qwen_hidden.hookpoint import HookPoint

Turn = Callable[[States], States]
"""The states that would be found, from those that are right."""


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """fault: its name in docs/doctor.md. says: what is wrong, a sentence. edits: of the model. feeds: of what it is
    fed. turn: of its states, afterwards. needs: hook points whose right states ``turn`` makes others of.

    whole: whether it holds for all passages together alone, and not for some of them by themselves.
    """

    fault: str
    says: str
    edits: tuple[Edit, ...] = ()
    feeds: tuple[Refeed, ...] = ()
    turn: Turn | None = None
    needs: frozenset[HookPoint] = frozenset()
    whole: bool = False

    @property
    def rearranges(self) -> bool:
        """Whether it makes its states of the right ones at the same hook points alone, without running anything."""
        return not (self.edits or self.feeds or self.needs)

    def expect(
        self,
        reference: Reference,
        observation: Observation,
        points: Sequence[HookPoint],
        *,
        depth: int | None = None,
    ) -> States:
        """What would be found at ``points``, if it held."""
        wanted = dict.fromkeys((*points, *self.needs))
        states: States = reference.run(observation, wanted, edits=self.edits, feeds=self.feeds, depth=depth)
        turned = states if self.turn is None else self.turn(states)
        return {point: turned[point] for point in points if point in turned}


def together(earlier: Sequence[Hypothesis], last: Hypothesis) -> Hypothesis:
    """``last`` on top of those that hold already."""
    if not earlier:
        return last
    everyone = (*earlier, last)
    turns = [each.turn for each in everyone if each.turn is not None]

    def turn(states: States) -> States:
        for step in turns:
            states = step(states)
        return states

    return Hypothesis(
        fault=last.fault,
        says=last.says,
        edits=tuple(edit for each in everyone for edit in each.edits),
        feeds=tuple(feed for each in everyone for feed in each.feeds),
        turn=turn if turns else None,
        needs=frozenset().union(*(each.needs for each in everyone)),
        whole=any(each.whole for each in everyone),
    )
