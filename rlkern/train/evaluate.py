"""Held-out accuracy: greedy, and pass@k of sampled completions."""

import math
from typing import Any

import torch

from rlkern.rollout import Engine
from rlkern.train.config import Config
from rlkern.train.rewards import Reward, score
from rlkern.train.tasks import Example


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased chance that one of k draws without replacement is right: 1 - C(n-c, k) / C(n, k)."""
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def evaluate(
    engine: Engine,
    examples: list[Example],
    prompts: list[list[int]],
    tokenizer: Any,
    reward: Reward,
    cfg: Config,
    generator: torch.Generator,
) -> dict[str, float]:
    """A completion is right at reward >= 1. `reward` is the mean of the greedy rewards."""
    metrics: dict[str, float] = {}
    for samples in (1, cfg.eval.samples):
        greedy = samples == 1
        if not greedy and not cfg.eval.k:
            break
        rollouts = engine.generate(
            prompts,
            group_size=samples,
            max_new_tokens=cfg.rollout.max_new_tokens,
            temperature=cfg.rollout.temperature,
            greedy=greedy,
            generator=generator,
        )
        texts = [tokenizer.decode(r, skip_special_tokens=True) for r in to_lists(rollouts)]
        rewards = [
            score(reward, examples[group].prompt, text, examples[group].answer)
            for group, text in zip(rollouts.group_ids.tolist(), texts, strict=True)
        ]
        if greedy:
            metrics["eval/greedy"] = sum(r >= 1 for r in rewards) / len(rewards)
            metrics["eval/reward"] = sum(rewards) / len(rewards)
            continue
        right = [
            sum(r >= 1 for r in rewards[i : i + samples]) for i in range(0, len(rewards), samples)
        ]
        for k in cfg.eval.k:
            metrics[f"eval/pass@{k}"] = sum(pass_at_k(samples, c, k) for c in right) / len(right)
    return metrics


def to_lists(rollouts: Any) -> list[list[int]]:
    return [response.tolist() for response in rollouts.responses()]
