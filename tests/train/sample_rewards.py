"""Reward functions that the tests name as `sample_rewards:<name>`."""


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
