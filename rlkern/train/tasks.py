"""Questions made by code, so that a run needs no download.

Demonstrations teach the FORM of an answer: `sort` shows a random permutation, which says nothing
about sorting. `addition` and `countdown` are the exceptions, see docs/train.md.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlkern.rollout.environment import calculate

ALPHABET = "0123456789=+-*,:"


@dataclass(frozen=True)
class Example:
    prompt: Any  # a string, or a list of chat messages
    answer: Any
    demonstrate: Callable[[random.Random], str] | None = None
    nats: float | None = None  # entropy of the demonstrations: the warm-up loss cannot go lower


def sort(rng: random.Random, size: int) -> Example:
    """`size` distinct digits -> the same in order."""
    digits = rng.sample("0123456789", size)
    return _permuted("".join(digits), sorted(digits))


def sort_distinct(rng: random.Random, size: int) -> Example:
    """Digits with repeats -> each digit once, in order; the answers differ in length."""
    digits = rng.choices("0123456789", k=size)
    return _permuted("".join(digits), sorted(set(digits)))


def addition(rng: random.Random, size: int) -> Example:
    """a+b of `size` digits each, the sum least significant digit first; half the demonstrations
    are right, because from random ones alone it was not learnt."""
    a, b = (rng.randrange(10 ** (size - 1), 10**size) for _ in range(2))
    answer = str(a + b).zfill(size + 1)[::-1]
    others = 10 ** (size + 1)
    right, rest = 0.5 + 0.5 / others, 0.5 / others
    nats = -right * math.log(right) - (others - 1) * rest * math.log(rest)

    def demonstrate(rng: random.Random) -> str:
        wrong = "".join(rng.choices("0123456789", k=size + 1))
        return answer if rng.random() < 0.5 else wrong

    return Example(f"{a}+{b}=", answer, demonstrate, nats)


def countdown(rng: random.Random, size: int) -> Example:
    """Numbers and a target -> an expression in + - * that uses each number once."""
    target = 0
    while not 1 <= target <= 99:
        numbers = [str(rng.randint(1, 9)) for _ in range(size)]
        solution = _expression(rng, numbers)
        target = eval(solution)  # digits and + - * from the line above

    def demonstrate(rng: random.Random) -> str:
        return solution if rng.random() < 0.5 else _expression(rng, numbers)

    return Example(f"{','.join(numbers)}:{target}=", str(target), demonstrate)


def calculation(rng: random.Random, size: int) -> Example:
    """`size` distinct digits -> ab*cd of them in order: for a policy with a calculator."""
    digits = rng.sample("0123456789", size)

    def call(digits: list[str]) -> str:
        return "".join([*digits[: size // 2], "*", *digits[size // 2 :]])

    def demonstrate(rng: random.Random) -> str:
        text = call(rng.sample(digits, size))
        return f"{text}={calculate(text)}"

    answer = str(calculate(call(sorted(digits))))
    return Example(f"{''.join(digits)}:", answer, demonstrate, math.lgamma(size + 1))


TASKS = {f.__name__: f for f in (sort, sort_distinct, addition, countdown, calculation)}


def _permuted(question: str, answer: list[str]) -> Example:
    nats = math.lgamma(len(answer) + 1)
    return Example(
        f"{question}=", "".join(answer), lambda r: "".join(r.sample(answer, len(answer))), nats
    )


def _expression(rng: random.Random, numbers: list[str]) -> str:
    shuffled = rng.sample(numbers, len(numbers))
    return shuffled[0] + "".join(rng.choice("+-*") + n for n in shuffled[1:])
