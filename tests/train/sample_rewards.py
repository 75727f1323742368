"""Reward functions that the tests name as `sample_rewards:<name>`."""

import os
import signal
import time
from pathlib import Path

calls: list[str] = []


def distinct(prompt, completion, answer):
    """Differs between almost any two answers, so that every group has a signal."""
    return len(set(completion)) / 4 + completion.count(answer[0]) / 8


def coarse(prompt, completion, answer):
    return len(completion) > 3


def zero(prompt, completion, answer):
    return 0


def one(prompt, completion, answer):
    return 1


def raises(prompt, completion, answer):
    raise KeyError("no such unit")


def nan(prompt, completion, answer):
    return float("nan")


def text(prompt, completion, answer):
    return "high"


def trace(number, prompt):
    """For PrefixRL: response tokens that somebody else is said to have given."""
    return prompt[:3]


def sleeps(prompt, completion, answer):
    """Never answers for completions that begin with the answer's last digit."""
    if completion.startswith(answer[-1]):
        time.sleep(1000)
    return distinct(prompt, completion, answer)


def dies(prompt, completion, answer):
    os._exit(3)


def sometimes_raises(prompt, completion, answer):
    if completion.startswith(answer[-1]):
        raise KeyError("no such unit")
    return distinct(prompt, completion, answer)


def fails_in_the_second_process(prompt, completion, answer):
    if os.environ.get("RANK") == "1" and prompt.startswith("0"):
        raise KeyError("no such unit")
    return distinct(prompt, completion, answer)


def kills_the_second_process(prompt, completion, answer):
    """Once, after step 7's evaluation; $RLKERN_TEST_MARK is a file that tells of it."""
    mark = Path(os.environ["RLKERN_TEST_MARK"])
    calls.append(prompt)
    if os.environ.get("RANK") == "1" and len(calls) > 130 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return distinct(prompt, completion, answer)
