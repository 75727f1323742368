"""Words for a run that cannot learn: what is seen, why, and which setting to change."""

import re
import resource
import traceback

import torch

from rlkern.train.config import Config

# A warm-up this far (nats per token) above the entropy of its demonstrations has not learnt the
# form yet: `sort` with 6 digits at 1.73 against 1.16 never met a reward.
FLOOR_MARGIN = 0.15
SLOWER = "Lower optim.lr, optim.epochs or optim.updates"
GUARDS = {  # of config.Guard -> the metric, and what to change
    "kl": ("policy/ppo_kl", f"{SLOWER}, or add algorithm.options.kl_coef"),
    "mismatch": ("logprob_gap/kl", "Lower rollout.max_staleness or optim.lr; look at precision"),
    "ratio": ("policy/ratio_max", f"{SLOWER}, or narrow algorithm.options.epsilon_high"),
    "grad_norm": ("grad_norm", "Lower optim.lr or optim.grad_clip"),
    "max_entropy": ("entropy", "Lower optim.lr or algorithm.options.entropy_coef"),
    "min_entropy": ("entropy", "Raise algorithm.options.entropy_coef or rollout.temperature"),
}
# Beyond this, one token's probability differs by more than 10 % between sampler and trainer.
MISMATCH = 0.1


def diagnose_step(metrics: dict[str, float], cfg: Config) -> dict[str, str]:
    """-> {short name: advice} for one RL step; empty when all is well."""
    found = {}
    low, high = metrics["reward/min"], metrics["reward/max"]
    same = f"every completion of all {cfg.rollout.prompts} groups got reward {high:g}"
    if metrics["signal/groups"] == 0 and low < high:
        found["no-signal"] = (
            "within each group the rewards are equal, so no answer is better than another and this "
            "step teaches nothing. Raise rollout.group_size or rollout.temperature, or use a "
            "reward with partial credit."
        )
    elif metrics["signal/groups"] == 0 and high >= 1:
        found["all-right"] = (
            f"{same}: nothing is left to learn. Stop here (run.steps), or give harder questions."
        )
    elif metrics["signal/groups"] == 0:
        found["all-equal"] = (
            f"{same}, so no answer is better than another and this step teaches nothing. The task "
            "may be out of reach from here (raise warmup.steps, rollout.group_size or "
            "rollout.temperature, or lower data.size), or the reward never matches the form of "
            "the answers (compare samples.jsonl with `reward`)."
        )
    elif metrics["grad_norm"] == 0:
        found["zero-gradient"] = (
            "rewards differ, but the gradient is exactly 0. Every token may be outside the clip "
            "range (algorithm.options, optim.epochs), or the parameters may be frozen."
        )
    cut, limit = metrics["completion/truncated"], cfg.rollout.max_new_tokens
    if cut > 0.5:
        found["truncated"] = (
            f"{'every completion was' if cut == 1 else f'{cut:.0%} of the completions were'} cut "
            f"off at rollout.max_new_tokens = {limit} without an end token. Raise it; or, if the "
            "model never ends its answers, check data.chat_template and its eos_token_id."
        )
    if metrics["logprob_gap/max"] > MISMATCH and cfg.samples_the_trained_policy:
        found["mismatch"] = (
            f"the trainer and the sampler disagree by {metrics['logprob_gap/max']:.3g} nats on a "
            "token: the policy that is trained is not the one that was sampled. Try model.dtype = "
            "'float32', or check that the model scales or caps its logits in no unusual way."
        )
    return found


def diverged(metrics: dict[str, float], cfg: Config) -> str:
    """The first guard that is overstepped; "" where none is."""
    for name, limit in cfg.guard:
        metric, advice = GUARDS[name]
        value = metrics.get(metric)
        if limit is None or value is None:
            continue
        if not (value >= limit if name.startswith("min_") else abs(value) <= limit):
            return f"{metric} = {value:.4g} is beyond guard.{name} = {limit:g}. {advice}"
    return ""


def out_of_memory(error: BaseException, cfg: Config) -> str:
    """What to change where memory was refused; "" for any other error."""
    wanted = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not known and "can't allocate memory" not in str(error):
        return ""
    part = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "generate" in part:
        advice = f"the rollout: lower rollout.max_sequences (now {cfg.rollout.max_sequences})"
    elif "warmup_step" in part:
        advice = f"the warm-up: lower warmup.batch_size (now {cfg.warmup.batch_size})"
    else:
        sequences = cfg.rollout.prompts * cfg.rollout.group_size
        now = cfg.optim.micro_batch or -(-sequences // cfg.optim.updates)
        advice = f"the update: set optim.micro_batch to {max(1, now // 2)} (now {now} sequences)"
        if not cfg.model.gradient_checkpointing:
            advice += ", model.gradient_checkpointing = true"
        if not cfg.optim.share_prefix:
            advice += ", optim.share_prefix = true where prompts are long"
    amount = f"{wanted[1]} were wanted" if wanted else "the amount was not told"
    held = f"{memory_held() / 2**30:.2f} GiB"
    return f"out of memory in {advice}.\n  {amount} beside the {held} that were held"


def memory_held() -> int:
    """Bytes: allocated on the GPU, or without one the most that this process has had."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def diagnose_warmup(loss: float, floor: float | None, cfg: Config) -> dict[str, str]:
    """After the warm-up: `loss` and `floor` in nats per token."""
    if floor is None or loss <= floor + FLOOR_MARGIN:
        return {}
    advice = (
        f"the warm-up ended at a loss of {loss:.3f} nats per token; the form is mastered near "
        f"{floor:.3f}. RL will meet few rewards or none: raise warmup.steps (now "
        f"{cfg.warmup.steps}) or warmup.lr."
    )
    return {"warmup": advice}


def nonfinite(tensors: dict[str, torch.Tensor]) -> str:
    """Describes the first tensor with NaN or Inf in it; "" where there is none."""
    for name, tensor in tensors.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            kind = "NaN" if torch.isnan(tensor).any() else "Inf"
            return f"{name} holds {bad} {kind} among {tensor.numel()} values"
    return ""
