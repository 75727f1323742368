"""One model in several processes.

Every process holds the rollouts, rewards and log-probs of a step, samples its part of the
questions, judges and trains its part of the sequences. Parameters, gradients and the optimiser's
state are cut among them (FSDP2).
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.distributed import fsdp, init_device_mesh
from transformers import PreTrainedModel

from rlkern import _ranks as ranks
from rlkern.train import TrainError
from rlkern.train.config import Config

REFUSED = {
    "fp8-unified": "its layers keep the codes of weights that are whole",
    "vllm": "it makes a process group of its own",
    "april": "its groups go on in the process that began them",
}


def check(cfg: Config, heldout: int) -> None:
    """Refuses what several processes cannot do."""
    n = ranks.size()
    for name in (cfg.precision, cfg.rollout.engine, cfg.rollout.strategy):
        if n > 1 and name in REFUSED:
            raise TrainError(f"{name} does not go with {n} processes: {REFUSED[name]}")
    counts = {"rollout.prompts": cfg.rollout.prompts, "warmup.batch_size": cfg.warmup.batch_size}
    for name, count in (counts | {"held-out questions": heldout}).items():
        if count < n:
            raise TrainError(f"{name}: {count} is less than the {n} processes")


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Cuts parameters among the processes: a unit of each layer, and one of the rest."""
    if ranks.size() > 1:
        mesh = init_device_mesh(model.device.type, (ranks.size(),))
        how = {"mesh": mesh, "mp_policy": fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        names = model._no_split_modules or ()
        for module in (*(m for m in model.modules() if type(m).__name__ in names), model):
            fsdp.fully_shard(module, **how)
            # sums, not means: losses have the denominators of all processes
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        model.run = MethodType(
            lambda own, function, *args, **how: function(own, *args, **how), model
        )
        fsdp.register_fsdp_forward_method(model, "run")
    return model


def call(function: Callable[..., Any], model: Any, *args: Any, **how: Any) -> Any:
    """function(model, ...) as a forward of the model, so that it finds the head's weight whole."""
    if isinstance(model, fsdp.FSDPModule):
        return model.run(function, *args, **how)
    return function(model, *args, **how)


class Silence:
    """The log of a process that is not the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None
