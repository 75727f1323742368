"""transformers and peft: log-probs from the LM head, quantised linear layers, attention.

docs/integrations/transformers.md.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rlkern import _check
from rlkern._peers import Peer
from rlkern.integrations._handle import Handle
from rlkern.integrations._head import head
from rlkern.kv import hf
from rlkern.quant import quantize_model
from rlkern.quant.linear import PRESETS
from rlkern.quant.model import SKIP

TRANSFORMERS = Peer("transformers", "5.10 - 5.23")
_OP = "integrations.transformers"
METHOD = "rlkern"


def enable() -> Handle:
    """Makes quant_method "rlkern" and attn_implementation "rlkern" known to `from_pretrained`.

    Raises:
        RuntimeError: transformers is missing, or registers such things otherwise.
    """
    auto = TRANSFORMERS.resolve(_OP, "transformers.quantizers.auto")
    TRANSFORMERS.takes(_OP, "transformers.quantizers.auto.register_quantizer", ("name",))
    base = "transformers.quantizers.base.HfQuantizer"
    TRANSFORMERS.takes(_OP, f"{base}._process_model_after_weight_loading", _AFTER)
    interfaces = [
        TRANSFORMERS.resolve(_OP, path)
        for path in (
            "transformers.AttentionInterface",
            "transformers.masking_utils.AttentionMaskInterface",
        )
    ]
    handle = Handle()
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        config, quantizer = _classes()
        handle.put(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, config)
        handle.put(auto.AUTO_QUANTIZER_MAPPING, METHOD, quantizer)
    known = [set(held().valid_keys()) for held in interfaces]
    hf.register()
    for held, before in zip(interfaces, known):
        if hf.NAME not in before:
            handle.undone_by(functools.partial(held._global_mapping.pop, hf.NAME, None))
    return handle


# --- quantised linear layers ----------------------------------------------------------------------

_AFTER = ("self", "model", "kwargs")


def quantization_config(recipe: str = "fp8", skip: tuple[str, ...] = SKIP) -> Any:
    """For `from_pretrained(..., quantization_config=...)`: `rlkern.quant.quantize_model` on load.

    The checkpoint is one in high precision: it is loaded whole and then quantised, layer by layer.
    A model so loaded is for inference; `rlkern.quant.save_quantized` writes it.

    Args:
        recipe, skip: as quantize_model.

    Raises:
        ValueError: an unknown recipe.
    """
    return _classes()[0](recipe=recipe, skip=skip)


@functools.cache
def _classes() -> tuple[type, type]:
    mixin = TRANSFORMERS.resolve(
        _OP, "transformers.utils.quantization_config.QuantizationConfigMixin"
    )
    base = TRANSFORMERS.resolve(_OP, "transformers.quantizers.base.HfQuantizer")

    class RlkernConfig(mixin):
        def __init__(self, recipe: str = "fp8", skip: Any = SKIP, **kwargs: Any) -> None:
            _check.one_of(_OP, "recipe", recipe, PRESETS)
            self.quant_method, self.recipe, self.skip = METHOD, recipe, list(skip)

    class RlkernQuantizer(base):
        requires_calibration = False

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            if self.pre_quantized:
                raise ValueError(
                    f"{_OP}: expected a checkpoint in high precision, got one that says it is "
                    "quantised: leave out quantization_config"
                )

        def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
            config = self.quantization_config
            return quantize_model(model, config.recipe, skip=tuple(config.skip))

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            # save_pretrained would write codes that nothing reads: rlkern.quant.save_quantized
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    return RlkernConfig, RlkernQuantizer


# --- log-probs from the LM head -------------------------------------------------------------------


def add_logprobs(model: nn.Module) -> Handle:
    """model(..., labels=labels, logprobs=("logprob", "entropy")) returns those, without logits.

    Row t is of the token labels[:, t + 1] after the tokens up to t: (B, L - 1) float32, 0 where the
    label is -100. `logprob_options` may hold further options of `linear_logprob`, temperature among
    them. What the model does to its logits (soft cap, scale) comes from its config. Without
    `logprobs` the call is the model's own.

    Args:
        model: a causal LM of transformers, or a peft model on one. A LoRA adapter on its LM head is
            computed as `[h, s A h] [W, B]^T`: without rounding W + s B A, and with one copy of W.

    Raises:
        TypeError: a model without an LM head that is a linear layer.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    _weights(inner)
    original = inner.forward

    @functools.wraps(original)
    def forward(*args: Any, logprobs: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        options = kwargs.pop("logprob_options", None) or {}
        if logprobs is None:
            if labels is not None:
                kwargs["labels"] = labels
            return original(*args, **kwargs)
        if labels is None:
            _check.fail(_OP, "labels", "of shape (B, L) with logprobs", None)
        backbone = getattr(inner, inner.base_model_prefix)
        hidden = backbone(*args, **{**kwargs, "use_cache": False})[0][:, :-1]
        h, weight, bias = _lora(_weights(inner), hidden)
        return head(
            h,
            weight,
            labels[:, 1:],
            bias=bias,
            outputs=logprobs,
            **{**hf.logit_options(inner), **options},
        )

    handle = Handle()
    handle.set(inner, "forward", forward)
    return handle


def _weights(model: nn.Module) -> nn.Module:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(getattr(layer, "weight", None), Tensor):
        kind = type(layer).__name__
        raise TypeError(f"{_OP}: expected a model with a linear LM head, got {kind}")
    return layer


def _lora(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias of one matmul that is the layer with its active adapters."""
    if not hasattr(layer, "lora_A"):
        return hidden, layer.weight, layer.bias
    base = layer.get_base_layer()
    if layer.disable_adapters or layer.merged:
        return hidden, base.weight, base.bias
    hiddens, weights = [hidden], [base.weight]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None or getattr(layer.lora_B[name], "bias", None) is not None:
            _check.fail(_OP, "the adapter of the LM head", "to be plain LoRA", repr(name))
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        dropped = layer.lora_dropout[name](hidden.to(down.dtype))
        inner = nn.functional.linear(dropped, down) * layer.scaling[name]
        hiddens.append(inner.to(hidden.dtype))
        weights.append(up.to(base.weight.dtype))
    return torch.cat(hiddens, -1), torch.cat(weights, -1), base.bias
