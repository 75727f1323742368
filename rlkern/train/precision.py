"""Which policy samples: the trainer's own, or a copy of it that is kept in step."""

import copy
import time
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.kv.hf import logit_options
from rlkern.quant import WeightSync, quantize_model
from rlkern.rollout import NativeEngine, Rollouts, VllmEngine, VllmServer
from rlkern.train import TrainError
from rlkern.train.config import Config

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
        elif cfg.rollout.max_staleness and cfg.rollout.engine == "native":
            sampler = copy.deepcopy(model).requires_grad_(False).eval()
        if cfg.precision == "fp8-unified":
            quantize_model(model, recipe, trains=True)
            how["score"] = scorer(sampler)
        self.of_trainer = NativeEngine(model, **how)
        # groups that a step leaves half done are not for an evaluation to complete
        apart = sampler is not model or cfg.rollout.strategy == "april"
        apart |= cfg.rollout.engine != "native"
        self.cfg, self.sampler, self.how = cfg, sampler, how
        self.engine = self.made() if apart else self.of_trainer

    def made(self) -> NativeEngine | VllmEngine | VllmServer:
        if self.cfg.rollout.engine == "native":
            return NativeEngine(self.sampler, **self.how)
        how = {name: self.how[name] for name in ("eos_token_ids", "max_sequences")}
        try:
            kind = VllmEngine if self.cfg.rollout.engine == "vllm" else VllmServer
            return kind(self.model, **how | self.cfg.rollout.engine_options)
        except (RuntimeError, ValueError) as error:  # not there, or not of this model
            raise TrainError(f"rollout.engine = {self.cfg.rollout.engine!r}: {error}") from error

    def restart(self, step: int, weights: dict[str, Tensor]) -> None:
        """A new engine in place of one that has failed; groups that were half done are lost."""
        shared, self.engine = self.engine is self.of_trainer, None
        self.engine = self.made()
        self.of_trainer = self.engine if shared else self.of_trainer
        self.refresh(step, weights)

    @torch.no_grad()
    def refresh(self, step: int, weights: dict[str, Tensor]) -> dict[str, float]:
        """Brings the sampler to these weights -> share of the code bytes that moved, seconds."""
        if isinstance(self.engine, VllmEngine | VllmServer):
            start = time.perf_counter()
            self.engine.update_weights(weights, step)
            return {"time/sync": time.perf_counter() - start}
        self.engine.bump_version(step)
        if self.sync is None:
            if self.sampler is not self.model:
                for name, parameter in self.sampler.named_parameters():
                    parameter.copy_(weights[name])
            return {}
        start = time.perf_counter()
        report = self.sync.update(weights)
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


def staleness(rollouts: Rollouts, step: int) -> dict[str, float]:
    """How many steps the weights that drew a token are behind."""
    if rollouts.versions is None:
        return {}
    age = (step - rollouts.trained(rollouts.versions)).float()
    return {"staleness/mean": age.mean().item(), "staleness/max": age.max().item()}


def mismatch(trained: Tensor, sampled: Tensor) -> dict[str, float]:
    """Between two policies' log-probs of tokens that the second one sampled.

    kl: of the sampler from the trainer, mean of e^d - 1 - d with d = trained - sampled (k3).
    """
    d = (trained - sampled).double()
    kl = (torch.expm1(d) - d).mean()
    return {"logprob_gap/max": d.abs().max().item(), "logprob_gap/kl": kl.item()}
