"""Rewards of rollouts, and held-out accuracy: greedy, and pass@k of sampled completions."""

import math
from typing import Any

import torch

from rlkern.rollout import Engine, Rollouts
from rlkern.train.config import Config
from rlkern.train.rewards import Reward, score
from rlkern.train.tasks import Example


def judge(
    rollouts: Rollouts, examples: list[Example], tokenizer: Any, reward: Reward
) -> list[dict[str, Any]]:
    """One {prompt, completion, answer, reward} per sequence; `examples` has one per prompt."""
    samples = []
    for group, ids in zip(rollouts.group_ids.tolist(), rollouts.responses(), strict=True):
        prompt, answer = examples[group].prompt, examples[group].answer
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        value = score(reward, prompt, text, answer)
        samples.append({"prompt": prompt, "completion": text, "answer": answer, "reward": value})
    return samples


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
    """A completion is right at reward >= 1."""

    def rewards(group_size: int, greedy: bool) -> list[float]:
        rollouts = engine.generate(
            prompts,
            group_size=group_size,
            max_new_tokens=cfg.rollout.max_new_tokens,
            temperature=cfg.rollout.temperature,
            greedy=greedy,
            generator=generator,
        )
        return [sample["reward"] for sample in judge(rollouts, examples, tokenizer, reward)]

    greedy = rewards(1, True)
    metrics = {"eval/greedy": sum(r >= 1 for r in greedy) / len(greedy)}
    metrics["eval/reward"] = sum(greedy) / len(greedy)
    if cfg.eval.k:
        n, sampled = cfg.eval.samples, rewards(cfg.eval.samples, False)
        right = [sum(r >= 1 for r in sampled[i : i + n]) for i in range(0, len(sampled), n)]
        for k in cfg.eval.k:
            metrics[f"eval/pass@{k}"] = sum(pass_at_k(n, c, k) for c in right) / len(right)
    return metrics
