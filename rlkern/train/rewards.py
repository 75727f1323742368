"""Reward functions, `reward(prompt, completion, answer) -> number`, and how they are called."""

import importlib
import math
import re
from collections.abc import Callable
from multiprocessing import get_context
from threading import Lock
from typing import Any

from rlkern.rollout import Rollouts
from rlkern.train import TrainError, load_function
from rlkern.train.tasks import Example

Reward = Callable[[Any, str, Any], float]
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
EXPRESSION = re.compile(r"\d(?:[-+*]\d)*")  # so plain that eval is safe: no **, no names


def exact(prompt: Any, completion: str, answer: Any) -> float:
    """1 where the completion is the answer, spaces around it aside."""
    return float(completion.strip() == str(answer).strip())


def numeric(prompt: Any, completion: str, answer: Any) -> float:
    """1 where the last number of the completion equals the answer (to 1e-6, relative)."""
    wanted, found = NUMBER.findall(str(answer)), NUMBER.findall(completion)
    if not wanted:
        raise ValueError(f"the answer {answer!r} holds no number")
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
    numbers = str(prompt).split(":")[0].split(",")
    right_form = EXPRESSION.fullmatch(completion) is not None
    if not right_form or sorted(re.findall(r"\d", completion)) != sorted(numbers):
        return 0.0
    return float(eval(completion) == int(answer))


BUILT_IN = {"exact": exact, "numeric": numeric, "math": math_equal, "countdown": countdown}


class RewardError(TrainError):
    """No number for a completion, and which one it was."""


class TimedReward:
    """A reward in a process of its own, which is ended when a call takes longer than `seconds`."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self.child, self.lock = name, seconds, None, Lock()

    def __call__(self, prompt: Any, completion: str, answer: Any) -> float:
        with self.lock:
            if self.child is None:
                context = get_context("forkserver")  # a copy of one that has imported this
                context.set_forkserver_preload([__name__])
                self.pipe, theirs = context.Pipe()
                self.child = context.Process(target=_serve, args=(self.name, theirs), daemon=True)
                self.child.start()
                theirs.close()
                self.pipe.recv()  # it has loaded the reward
            self.pipe.send((prompt, completion, answer))
            try:
                if not self.pipe.poll(self.seconds):
                    raise TimeoutError(f"no answer within reward_timeout = {self.seconds:g} s")
                error, value = self.pipe.recv()
            except (TimeoutError, EOFError, OSError):
                self.child.kill()
                self.child.join()
                self.child = None
                raise
        if error:
            raise RuntimeError(error)
        return value


def _serve(name: str, pipe: Any) -> None:
    reward = load_reward(name)
    pipe.send("ready")
    while True:
        arguments = pipe.recv()
        try:
            pipe.send(("", reward(*arguments)))
        except Exception as error:
            pipe.send((f"{type(error).__name__}: {error}", None))


def load_reward(name: str, timeout: float = 0.0) -> Reward:
    """timeout: in seconds, for a call; 0: none, and no process of its own."""
    if timeout:
        load_reward(name)  # what is wrong with the setting shows here
        return TimedReward(name, timeout)
    if name == "math":
        try:
            importlib.import_module("math_verify")
        except ImportError as error:
            raise TrainError(
                "reward: 'math' needs math-verify: pip install 'rlkern[math]'"
            ) from error
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        known = ", ".join(BUILT_IN)
        raise TrainError(f"reward: expected one of {known} or module:function, got {name!r}")
    return load_function("reward", name)


def score(reward: Reward, prompt: Any, completion: str, answer: Any) -> float:
    """One reward; whatever goes wrong is told together with the prompt that it happened on."""
    where = f"prompt {prompt!r}, completion {completion!r}, answer {answer!r}"
    try:
        value = reward(prompt, completion, answer)
    except Exception as error:
        what = f"the reward function raised {type(error).__name__}: {error}"
        raise RewardError(f"{what}\n  on {where}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"the reward function returned {value!r}, not a number\n  on {where}")
    return number


def judge(
    rollouts: Rollouts, examples: list[Example], tokenizer: Any, reward: Reward, policy: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """One {prompt, completion, answer, reward} per sequence; `examples` has one per prompt. With an
    environment also `turns`, their rewards, and where not all was drawn `parts`: [text, drawn].

    policy: where there is no reward, "fail" raises, "zero" gives 0 and "skip" gives NaN. These
    errors are returned, too.
    """
    samples, errors = [], []
    bounds, mask = rollouts.cu_seqlens.tolist(), rollouts.mask
    forced = mask is not None and not bool(mask.all())
    for group, ids in zip(rollouts.group_ids.tolist(), rollouts.responses(), strict=True):
        at = slice(*bounds[len(samples) : len(samples) + 2])
        prompt, answer = examples[group].prompt, examples[group].answer
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        try:
            value = score(reward, prompt, text, answer)
        except RewardError as error:
            if policy == "fail":
                raise
            value = 0.0 if policy == "zero" else math.nan
            errors.append(str(error))
        samples.append({"prompt": prompt, "completion": text, "answer": answer, "reward": value})
        if rollouts.turn_rewards is not None:
            paid = rollouts.turn_rewards[at].double().cpu()
            samples[-1]["turns"] = rollouts.turns[at].cpu().bincount(weights=paid).tolist()
        if forced:
            drawn, counts = mask[at].unique_consecutive(return_counts=True)
            runs = (run.tolist() for run in ids.split(counts.tolist()))
            texts = (tokenizer.decode(run, skip_special_tokens=True) for run in runs)
            samples[-1]["parts"] = list(zip(texts, drawn.tolist()))
    return samples, errors
