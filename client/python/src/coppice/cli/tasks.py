"""Verifiable tasks for the demo: a rule grades the replies, never a model."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from coppice.types import Message

NUM_DIGITS = 4
EXAMPLES = ((7, 2, 9, 4), (5, 1, 8, 3), (6, 9, 2, 1))


@dataclasses.dataclass(frozen=True)
class Question:
    messages: list[Message]  # system message and worked examples first: the prefix that all share
    answer: str


class Task(Protocol):
    """What train-demo needs of a task."""

    def draw(self, rng: random.Random) -> Question:
        """A new question."""

    def reward(self, question: Question, reply: str) -> float:
        """Grade in [0, 1]; 1 only for the exact answer."""


def _comma(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


class NumberList:
    """Rearrange four distinct digits.

    The reply must be the numbers alone. Reward: 0 for anything else, 0.1 for the right form, and up
    to 0.9 for the share of positions that hold the right number.
    """

    def __init__(self, system: str, solve: Callable[[Sequence[int]], Sequence[int]]) -> None:
        self._system = system
        self._solve = solve

    def draw(self, rng: random.Random) -> Question:
        numbers = rng.sample(range(1, 10), NUM_DIGITS)
        messages: list[Message] = [{"role": "system", "content": self._system}]
        for example in EXAMPLES:
            messages.append({"role": "user", "content": _comma(example)})
            messages.append({"role": "assistant", "content": _comma(self._solve(example))})
        messages.append({"role": "user", "content": _comma(numbers)})
        return Question(messages=messages, answer=_comma(self._solve(numbers)))

    def reward(self, question: Question, reply: str) -> float:
        if not re.fullmatch(r"\d+(, \d+)*", reply.strip()):
            return 0.0
        got, want = reply.strip().split(", "), question.answer.split(", ")
        hits = sum(a == b for a, b in zip(got, want, strict=False))
        return 0.1 + 0.9 * hits / max(len(got), len(want))


TASKS: dict[str, Task] = {
    "number-reversal": NumberList(
        "Write the numbers in reverse order. Reply with the numbers only, separated by commas.",
        lambda numbers: numbers[::-1],
    ),
    "number-sorting": NumberList(
        "Sort the numbers in ascending order. "
        "Reply with the sorted numbers only, separated by commas.",
        sorted,
    ),
}
