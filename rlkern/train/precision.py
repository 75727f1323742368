"""Which policy samples: the trainer's own, or a copy of it that is kept in step."""

import copy
import time
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.quant import WeightSync, quantize_model
from rlkern.rollout import NativeEngine, VllmEngine
from rlkern.train import TrainError
from rlkern.train.config import Config
from rlkern.train.model import logit_options

RECIPES = {"fp8-unified": "fp8", "fp8-rollout": "fp8", "nvfp4-rollout": "nvfp4"}


class RolloutPolicy:
    """`engine` samples rollouts; `of_trainer` samples from the trainer's model as it is.

    fp8-unified also turns the trainer's linear layers into `MasterLinear`: both sides then run one
    forward, in bits, from the codes to the head (Jet-RL, arXiv:2601.14243).
    """

    def __init__(self, cfg: Config, model: Any, end_tokens: list[int]) -> None:
        self.model, self.sync, sampler = model, None, model
        how = {"eos_token_ids": end_tokens}
        how |= {"max_sequences": cfg.rollout.max_sequences, "chunk": cfg.rollout.chunk}
        if cfg.precision != "bf16":
            recipe = RECIPES[cfg.precision]
            sampler = quantize_model(copy.deepcopy(model), recipe).requires_grad_(False).eval()
            self.sync = WeightSync(sampler)
        if cfg.precision == "fp8-unified":
            quantize_model(model, recipe, trains=True)
            how["score"] = scorer(sampler)
        self.of_trainer = NativeEngine(model, **how)
        # groups that a step leaves half done are not for an evaluation to complete
        apart = sampler is not model or cfg.rollout.strategy == "april"
        self.engine: NativeEngine | VllmEngine = self.of_trainer
        if cfg.rollout.engine == "vllm":
            how = {"eos_token_ids": end_tokens, "max_sequences": cfg.rollout.max_sequences}
            try:
                self.engine = VllmEngine(model, **how | cfg.rollout.engine_options)
            except (RuntimeError, ValueError) as error:  # not there, or not of this model
                raise TrainError(f"rollout.engine = 'vllm': {error}") from error
        elif apart:
            self.engine = NativeEngine(sampler, **how)

    def refresh(self, step: int) -> dict[str, float]:
        """Brings the sampler up to date -> the share of code bytes that moved, and the seconds."""
        if isinstance(self.engine, VllmEngine):
            start = time.perf_counter()
            self.engine.update_weights(dict(self.model.named_parameters()), step)
            return {"time/sync": time.perf_counter() - start}
        self.engine.bump_version(step)
        if self.sync is None:
            return {}
        start = time.perf_counter()
        report = self.sync.update(dict(self.model.named_parameters()))
        share = report.changed_bytes / report.num_bytes
        return {"sync/changed": share, "time/sync": time.perf_counter() - start}


def scorer(model: Any):
    """Log-probs of sampled tokens by the op that the trainer uses, whatever the batch."""

    def score(hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        out = rlkern.linear_logprob(
            hidden,
            model.get_output_embeddings().weight,
            tokens,
            temperature=temperature,
            batch_invariant=True,
            **logit_options(model),
        )
        return out.logprob

    return score


def mismatch(trained: Tensor, sampled: Tensor) -> dict[str, float]:
    """Between two policies' log-probs of tokens that the second one sampled.

    kl: of the sampler from the trainer, mean of e^d - 1 - d with d = trained - sampled (k3).
    """
    d = (trained - sampled).double()
    kl = (torch.expm1(d) - d).mean()
    return {"logprob_gap/max": d.abs().max().item(), "logprob_gap/kl": kl.item()}
