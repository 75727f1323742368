"""Reward functions: `reward(prompt, completion, answer) -> number`, and how they are called."""

import ast
import importlib
import math
import operator
import re
import sys
from collections.abc import Callable
from typing import Any

from rlkern.train.errors import TrainError

Reward = Callable[[Any, str, Any], float]

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def exact(prompt: Any, completion: str, answer: Any) -> float:
    """1 where the completion is the answer, spaces around it aside."""
    return float(completion.strip() == str(answer).strip())


def numeric(prompt: Any, completion: str, answer: Any) -> float:
    """1 where the last number of the completion equals the answer (to 1e-6, relative)."""
    wanted = NUMBER.findall(str(answer))
    if not wanted:
        raise ValueError(f"the answer {answer!r} holds no number")
    found = NUMBER.findall(completion)
    if not found:
        return 0.0
    got, want = (float(text.replace(",", "")) for text in (found[-1], wanted[-1]))
    return float(math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9))


def math_equal(prompt: Any, completion: str, answer: Any) -> float:
    """1 where completion and answer are mathematically equal, by math-verify."""
    from math_verify import parse, verify

    text = str(answer)
    gold = parse(text if "$" in text or "\\boxed" in text else f"${text}$")
    if not gold:
        raise ValueError(f"math-verify cannot read the answer {answer!r}")
    return float(verify(gold, parse(completion)))


def countdown(prompt: Any, completion: str, answer: Any) -> float:
    """1 where the completion uses each number of the prompt once and equals the answer."""
    if not re.fullmatch(r"[0-9+\-*]+", completion):
        return 0.0
    numbers = str(prompt).split(":")[0].split(",")
    if sorted(re.findall(r"\d+", completion)) != sorted(numbers):
        return 0.0
    try:
        return float(evaluate(completion) == int(answer))
    except SyntaxError:
        return 0.0


def evaluate(expression: str) -> int:
    """The value of integers joined by + - *; anything else is a SyntaxError."""
    return _value(ast.parse(expression, mode="eval").body)


def _value(node: ast.AST) -> int:
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    if isinstance(node, ast.BinOp) and type(node.op) in signs:
        return signs[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    raise SyntaxError("not an expression in + - *")


BUILT_IN = {"exact": exact, "numeric": numeric, "math": math_equal, "countdown": countdown}


def load_reward(name: str) -> Reward:
    if name == "math":
        try:
            importlib.import_module("math_verify")
        except ImportError as error:
            raise TrainError(
                "reward: 'math' needs the math-verify library: pip install 'rlkern[train]'"
            ) from error
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, function = name.partition(":")
    if not function:
        raise TrainError(
            f"reward: expected one of {', '.join(BUILT_IN)} or module:function, got {name!r}"
        )
    if "" not in sys.path:  # a module next to the recipe's user, as `python script.py` finds it
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TrainError(f"reward: {name!r} could not be loaded: {error}") from error


def score(reward: Reward, prompt: Any, completion: str, answer: Any) -> float:
    """One reward; whatever goes wrong is told together with the prompt that it happened on."""
    where = f"prompt {prompt!r}, completion {completion!r}, answer {answer!r}"
    try:
        value = reward(prompt, completion, answer)
    except Exception as error:
        raise TrainError(
            f"the reward function raised {type(error).__name__}: {error}\n  on {where}"
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TrainError(f"the reward function returned {value!r}, not a number\n  on {where}")
    return number
