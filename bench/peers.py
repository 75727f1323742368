"""What each op is compared with: eager torch, the same under torch.compile, and other packages.

A peer of a package that is not installed is absent from the dictionary.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def logprob_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    logprob = log_p.gather(-1, targets[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


def linear_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits rounded to the inputs' dtype, as eager trainers have them."""
    return logprob_entropy(hidden @ weight.T, targets)


def trl_logprob_entropy() -> Callable | None:
    if importlib.util.find_spec("trl") is None:
        return None
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def run(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax(logits, targets), entropy_from_logits(logits)

    return run


def logits_warpers(top_k: int, top_p: float) -> list[Callable] | None:
    """Hugging Face's, as `generate` applies them; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.generation import logits_process

    warpers = []
    if top_k:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    return warpers


def multinomial(
    logits: Tensor, temperature: float, warpers: Sequence[Callable] = ()
) -> tuple[Tensor, Tensor]:
    """A token a row and its log-prob."""
    z = logits.float() / temperature
    for warper in warpers:
        z = warper(None, z)
    p = z.softmax(-1)
    token = p.multinomial(1)
    return token, p.gather(-1, token).log()


def gumbel_argmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same by an exponential race, as vLLM draws."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    token = (log_p - torch.empty_like(log_p).exponential_().log_()).argmax(-1, keepdim=True)
    return token, log_p.gather(-1, token)


def branch_test(
    logits: Tensor, embedding: Tensor | None, tau_abs: float, tau_rel: float
) -> tuple[Tensor, ...]:
    """LATR's test on the softmax, and ROSE's diversity where there is an embedding."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    top, ids = p.topk(2 if embedding is None else 20)
    passes = (top[:, 1:2] > tau_abs) & (top[:, :1] - top[:, 1:2] < tau_rel)
    if embedding is None:
        return passes, entropy
    unit = torch.nn.functional.normalize(embedding[ids].float(), dim=-1)
    mean = (top[..., None] * unit).sum(1)
    return passes, entropy * (top.square().sum(-1) - mean.square().sum(-1))


def looped_similarity(a: Tensor, b: Tensor, mode: str) -> Tensor:
    """The dynamic programme of each pair in Python, as LATR has it (there compiled by numba for
    ROUGE-L, torchaudio's for the edit distance)."""
    found = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        row = list(range(len(y) + 1)) if mode == "edit" else [0] * (len(y) + 1)
        for i, one in enumerate(x, 1):
            above, row = row, [i if mode == "edit" else 0]
            for j, other in enumerate(y, 1):
                if mode == "edit":
                    row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (one != other)))
                else:
                    row.append(above[j - 1] + 1 if one == other else max(row[-1], above[j]))
        found.append(row[-1] / len(x))
    return torch.tensor(found)


def scatter_advantage(rewards: Tensor, group_ids: Tensor, num_groups: int) -> Tensor:
    """GRPO for groups of any size, vectorised."""
    count = rewards.new_zeros(num_groups).index_add_(0, group_ids, torch.ones_like(rewards))
    mean = rewards.new_zeros(num_groups).index_add_(0, group_ids, rewards) / count
    deviation = rewards - mean[group_ids]
    squares = rewards.new_zeros(num_groups).index_add_(0, group_ids, deviation**2)
    std = (squares / (count - 1)).sqrt()
    return deviation / (std[group_ids] + 1e-6)


def reshaped_advantage(rewards: Tensor, samples: int) -> Tensor:
    """GRPO as TRL has it: groups of one size, in blocks."""
    grouped = rewards.view(-1, samples)
    mean = grouped.mean(dim=1).repeat_interleave(samples)
    std = grouped.std(dim=1).repeat_interleave(samples)
    return (rewards - mean) / (std + 1e-6)


def looped_advantage(rewards: Tensor, group_ids: list[int]) -> Tensor:
    """GRPO as verl's compute_grpo_outcome_advantage has it: a Python loop over rows."""
    members: dict[int, list[Tensor]] = {}
    for i, group in enumerate(group_ids):
        members.setdefault(group, []).append(rewards[i])
    stats = {}
    for group, values in members.items():
        stacked = torch.stack(values)
        stats[group] = (torch.mean(stacked), torch.std(stacked) + 1e-6)
    out = rewards.clone()
    for i, group in enumerate(group_ids):
        mean, scale = stats[group]
        out[i] = (rewards[i] - mean) / scale
    return out
